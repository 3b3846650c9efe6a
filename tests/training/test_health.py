"""Health figures: equal to their formulas, for any number of ranks, and what they tell about an encoder."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from fastsimclr import pretrain
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.training import health
from fastsimclr.training.health import Health
from fastsimclr.training.step import Outputs

pytestmark = pytest.mark.usefixtures("one_thread")

FIGURES = {
    *("contrastive_accuracy", "alignment", "uniformity", "effective_rank_h", "effective_rank_z"),
    *("mean_norm_h", "dead_dimensions_h"),
}
RUN: dict[str, Any] = {
    "image_size": 16,
    "batch_size": 128,  # 12 steps per epoch of 1,433 digits
    "model": {"hidden": 32, "out": 16},
    "optim": {"name": "adamw", "lr": 0.01},
    "loss": {"temperature": 0.2},
    "scale": [0.4, 1.0],
    "jitter_prob": 0.0,
    "blur_prob": 0.0,
    "precision": "fp32",
    "device": "cpu",
    "log": None,
    "knn_every": 0,
    "epochs": 2,
}


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(images: int) -> Outputs:
    """Outputs with correlated views, three dead dimensions of h, and different singular values."""
    z1, h = rows(images, 8), rows(images, 40, seed=2) * torch.arange(1, 41)
    h[:, :3] = torch.tensor([0.0, 2.0, -1.0])
    return Outputs([z1, z1 + rows(images, 8, seed=1), rows(images, 8, seed=3)], [h])


def measure(measured: Health, outputs: Outputs, sizes: list[int], **record: Any) -> dict[str, Any]:
    """Return the figures of step 1, as in its record."""
    record = {"step": 1, "epoch": 0} | record
    record |= {name: float(figure) for name, figure in measured.measure(record["step"], outputs, sizes).items()}
    measured.complete(record)
    return {name: value for name, value in record.items() if name not in ("step", "epoch")}


def make_health(world: World = SINGLE_PROCESS, batch_size: int = 2) -> Health:
    return Health(world, batch_size=batch_size, steps_per_epoch=80, warmup_steps=10)


def test_figures_are_those_of_the_formulas() -> None:
    outputs = batch(9)
    z1, z2 = (z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1, keepdims=True) for z in outputs.z[:2])
    h = outputs.h.double().numpy()
    z, hits = [*z1, *z2], 0
    for i, anchor in enumerate(z):
        similarity = {j: anchor @ other for j, other in enumerate(z) if j != i}
        hits += max(similarity, key=lambda j: similarity[j]) == (i + 9) % 18
    pairs = [
        np.mean([math.exp(-2 * sum((a - b) ** 2)) for a, b in itertools.combinations(view, 2)]) for view in (z1, z2)
    ]
    ranks = []
    for matrix in (h, outputs.z[0].double().numpy()):
        singular = np.linalg.svd(matrix, compute_uv=False)
        p = singular / sum(singular) + 1e-7
        ranks.append(math.exp(-sum(p * np.log(p))))
    assert 0 < hits < 18
    assert measure(make_health(), outputs, [9]) == pytest.approx(
        {
            "contrastive_accuracy": hits / 18,
            "alignment": np.mean([sum((a - b) ** 2) for a, b in zip(z1, z2, strict=True)]),
            "uniformity": np.mean(np.log(pairs)),
            "mean_norm_h": np.mean([math.sqrt(sum(row**2)) for row in h]),
            "dead_dimensions_h": 3 / 40,
            "effective_rank_h": ranks[0],
            "effective_rank_z": ranks[1],
        },
        rel=1e-6,  # the figures are in z's dtype, float32
    )


def test_extremes() -> None:
    constant, zero, other = torch.ones(16, 8), torch.zeros(16, 8), rows(16, 8)
    assert health.contrastive_accuracy(constant, constant) == 0
    assert health.uniformity(constant) == pytest.approx(0)
    assert health.contrastive_accuracy(other, 2 * other) == 1
    assert health.alignment(other, -other) == pytest.approx(4)
    assert health.effective_rank(health.gram(constant)) == pytest.approx(1, abs=1e-3)
    assert health.effective_rank(health.gram(zero)) == 0
    assert health.effective_rank(health.gram(torch.eye(16, 8))) == pytest.approx(8, abs=1e-3)
    assert health.dead_dimensions(constant) == health.dead_dimensions(zero) == 1


def on_rank(rank: int, sizes: list[int]) -> dict[str, Any]:
    whole = batch(sum(sizes))
    first = sum(sizes[:rank])
    own = slice(first, first + sizes[rank])
    outputs = Outputs([z[own] for z in whole.z], [h[own] for h in whole.h_parts])
    return measure(make_health(World(rank, len(sizes), torch.device("cpu"))), outputs, sizes)


@pytest.mark.slow
def test_two_ranks_measure_the_same_as_one() -> None:
    sizes = [601, 600]  # every third image is used: 201 of rank 0, beginning with its first, and 200 of rank 1
    expected = on_rank(0, [sum(sizes)])
    assert run_ranks(2, on_rank, sizes) == [pytest.approx(expected, rel=1e-6)] * 2


def test_only_full_batches_of_some_steps_are_measured() -> None:
    measured = make_health(batch_size=9)
    steps = [step for step in range(1, 62) if measured.measure(step, batch(9), [9])]
    assert steps == [1, 21, 41, 61]
    assert not measured.measure(81, batch(8), [8])


def test_a_step_that_is_not_finite_has_no_figures() -> None:
    outputs = batch(9)
    outputs.z[1][3, 3] = torch.inf
    assert measure(make_health(), outputs, [9]) == {}


@pytest.mark.parametrize(
    ("similarity", "line"),
    [
        (None, "step 41: collapsed: the projections have an effective rank of 1.0"),
        (0.0, "step 41: not learning: contrastive accuracy "),
        (2.0, None),
    ],
)
def test_warning(similarity: float | None, line: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """The line appears once, after the warm-up and the first epoch. similarity: of the views; None: all are equal."""
    z = rows(256, 16)
    outputs = Outputs([torch.ones(256, 16)] * 2, [z])
    if similarity is not None:
        outputs = Outputs([z, rows(256, 16, seed=1) + similarity * z], [z])
    measured = make_health()
    measure(measured, outputs, [256], step=1, epoch=1)
    measure(measured, outputs, [256], step=21, epoch=0)
    assert not capsys.readouterr().err
    for step in (41, 61):
        measure(measured, outputs, [256], step=step, epoch=1)
    printed = capsys.readouterr().err.splitlines()
    assert [text.removeprefix("warning: ")[: len(line or "")] for text in printed] == ([line] if line else [])


class Encoder(nn.Module):
    """factor 0: a constant output."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
        )
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return 1 + self.factor * self.layers(images)  # type: ignore[no-any-return]


def test_constant_random_and_trained_encoders_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = pretrain("digits", Encoder(), output=str(tmp_path / "trained"), **RUN).metrics
    constant = pretrain("digits", Encoder(0.0), output=str(tmp_path / "constant"), **RUN).metrics
    chance = 1 / (2 * 128 - 1)
    first, last = ({name: trained[name][step] for name in FIGURES} for step in (0, -1))  # first: the initial weights
    assert last["contrastive_accuracy"] > 2 * first["contrastive_accuracy"] > 2 * chance
    assert last["alignment"] < 0.6 * first["alignment"]
    assert last["dead_dimensions_h"] == first["dead_dimensions_h"] == 0
    for name in ("effective_rank_h", "effective_rank_z"):
        assert min(*trained[name]) > 8  # of 288 and 16 dimensions
        assert max(*constant[name]) < health.MIN_EFFECTIVE_RANK
    assert max(*constant["contrastive_accuracy"]) < 2 * chance
    assert min(*constant["dead_dimensions_h"]) == 1
    assert capsys.readouterr().err.count("warning:") == 1  # of the constant encoder


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    options = RUN | {"max_steps": 2}
    weights = [
        pretrain("digits", Encoder(), output=str(tmp_path / str(on)), health=on, **options).encoder.state_dict()
        for on in (True, False)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
