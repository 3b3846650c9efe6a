"""The learning-rate schedule and the peak learning rates."""

import itertools
import math

import pytest

from fastsimclr.optim import learning_rate, resolve_lr


def rates(warmup_steps: int, total_steps: int, peak: float = 4.8) -> list[float]:
    return [
        learning_rate(step, peak=peak, warmup_steps=warmup_steps, total_steps=total_steps)
        for step in range(total_steps)
    ]


def test_warmup_is_linear_from_above_zero_to_the_peak() -> None:
    assert rates(4, 20)[:4] == pytest.approx([1.2, 2.4, 3.6, 4.8])


def test_cosine_decays_from_the_peak_to_zero_without_restart() -> None:
    # 16 cosine steps: the peak first, half of it in the middle, 0 only after the last step.
    cosine = rates(4, 20)[4:]
    assert cosine[0] == 4.8
    assert cosine[8] == pytest.approx(2.4)
    assert cosine[4] == pytest.approx(4.8 * (1 + math.sqrt(0.5)) / 2)  # a straight line would give 3.6
    assert all(a > b for a, b in itertools.pairwise(cosine))
    assert 0 < cosine[-1] < 0.02 * 4.8
    for step in (20, 21, 1000):
        assert learning_rate(step, peak=4.8, warmup_steps=4, total_steps=20) == 0.0


def test_rate_changes_at_every_step() -> None:
    # ImageNet with batch size 4096: 312 steps per epoch, 10 of 100 epochs of warmup. Only the last warmup step and the
    # first cosine step, both at the peak, are equal; a schedule stepped per epoch would give 100 values.
    each = rates(3120, 31200)
    assert len(set(each[:3120] + each[3121:])) > 31000
    assert each[3119] == each[3120] == max(each) == 4.8


@pytest.mark.parametrize(("warmup_steps", "expected"), [(0, [1.0, 0.75, 0.25]), (3, [1 / 3, 2 / 3, 1.0])])
def test_only_decay_or_only_warmup(warmup_steps: int, expected: list[float]) -> None:
    assert rates(warmup_steps, 3, peak=1.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"step": -1}, "step is -1"),
        ({"peak": -0.1}, "peak is -0.1"),
        ({"peak": float("nan")}, "peak is nan"),
        ({"warmup_steps": 11}, "warmup_steps is 11 and total_steps 10.*shorten"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"total_steps": 0, "warmup_steps": 0}, "total_steps 0"),
    ],
)
def test_inconsistent_arguments_raise(bad: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate(**{"step": 0, "peak": 1.0, "warmup_steps": 2, "total_steps": 10, **bad})


@pytest.mark.parametrize("batch_size", [256, 512, 1024, 4096])
def test_lars_peak_rates_match_the_paper(batch_size: int) -> None:
    assert resolve_lr("linear", batch_size, "lars") == pytest.approx(0.3 * batch_size / 256)
    assert resolve_lr("sqrt", batch_size, "lars") == pytest.approx(0.075 * math.sqrt(batch_size))


@pytest.mark.parametrize(("optimizer", "published"), [("sgd", 0.6), ("adamw", 1e-3)])
def test_peak_rates_of_other_optimizers_scale_from_batch_size_512(optimizer: str, published: float) -> None:
    assert resolve_lr("linear", 512, optimizer) == resolve_lr("sqrt", 512, optimizer) == published
    assert resolve_lr("linear", 2048, optimizer) == pytest.approx(4 * published)
    assert resolve_lr("sqrt", 2048, optimizer) == pytest.approx(2 * published)


def test_resolve_lr_rejects_unknown_arguments() -> None:
    with pytest.raises(ValueError, match="rule is 'cubic', expected 'linear' or 'sqrt'"):
        resolve_lr("cubic", 256, "lars")
    with pytest.raises(ValueError, match="optimizer is 'lamb', expected one of lars, sgd, adamw"):
        resolve_lr("linear", 256, "lamb")
    with pytest.raises(ValueError, match="batch_size is 0"):
        resolve_lr("linear", 0, "lars")
