"""The precision of the encoder: selection by auto, and training in float16 with scaled gradients."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.amp import GradScaler
from weights import steps

from fastsimclr import Augmentation, nt_xent, precision
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.config import parse
from fastsimclr.data import open_source
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.distributed import World
from fastsimclr.evaluation.classifier import Classifier, Schedule, train_classifier
from fastsimclr.evaluation.features import embed
from fastsimclr.models import EncoderSpec
from fastsimclr.precision import choose_precision
from fastsimclr.train import main
from fastsimclr.training.step import Step
from fastsimclr.training.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TURING = "fp16 autocast with scaled gradients (auto: this GPU has fp16 tensor cores, but no bf16)"
FP16 = choose_precision("fp16", CPU)


class SmallEncoder(nn.Sequential):
    """Replaces ResNet-18, whose float16 steps take seconds on a CPU."""

    out_features = 16
    spec = EncoderSpec("resnet18")

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=4), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


@pytest.fixture
def small_encoder(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr("fastsimclr.training.build.build", SmallEncoder)


def set_scale(training: Trainer, scale: float) -> None:
    training.scaler.load_state_dict(GradScaler("cpu", init_scale=scale).state_dict())


def set_scaler_options(monkeypatch: pytest.MonkeyPatch, **options: float) -> None:
    monkeypatch.setattr(precision, "GradScaler", functools.partial(GradScaler, **options))


def options(output: Path, *more: str) -> list[str]:
    default = ["--data.train=digits", "--data.image_size=16", "--batch_size=16", "--model.hidden=32", "--model.out=16"]
    default += ["--optim.name=sgd", "--optim.lr=0.01", "--knn_every=0", "--device=cpu", "--precision=fp16"]
    return [*default, f"--output={output}", *more]


def open_training(output: Path, *more: str, world: World = World(0, 1, CPU)) -> Trainer:  # noqa: B008 - frozen
    return Trainer(parse(options(output, *more)), world)


# Selection


@pytest.mark.parametrize(
    ("capability", "dtype", "why"),
    [
        ((6, 1), None, "fp32 (auto: this GPU has neither bf16 nor fp16 tensor cores)"),
        ((7, 0), torch.float16, TURING),
        ((7, 5), torch.float16, TURING),
        ((8, 0), torch.bfloat16, "bf16 autocast (auto: this GPU supports bf16)"),
    ],
)
def test_auto_selects_the_gpus_fast_precision(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype | None, why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    # As in PyTorch, where older GPUs emulate bf16.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or capability >= (8, 0)
    )
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    chosen = choose_precision("auto", GPU)
    assert (chosen.autocast, chosen.dtype, chosen.why) == (dtype, torch.float32, why)
    assert chosen.view_dtype == (dtype or torch.float32)
    assert chosen.grad_scaler(GPU).is_enabled() == (dtype == torch.float16)


@pytest.mark.parametrize(
    ("wanted", "dtype", "weights"),
    [
        ("bf16", torch.bfloat16, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("fp32", None, torch.float32),
        ("fp64", None, torch.float64),
    ],
)
def test_explicit_precision(wanted: str, dtype: torch.dtype | None, weights: torch.dtype) -> None:
    assert choose_precision(wanted, CPU) == (dtype, weights, wanted)
    assert choose_precision(wanted, CPU).grad_scaler(CPU).is_enabled() == (wanted == "fp16")


# A step


def small_model() -> nn.Module:
    """Return a model without batch normalization, so that micro-batches give the same result as the whole batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 3 * 3, 16))


def gradients(
    chosen: precision.Precision,
    scaler: GradScaler,
    micro_batch_size: int | None,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the unscaled gradients of all parameters, concatenated."""
    model = small_model()
    torch.manual_seed(1)
    views = [torch.randn(12, 3, 8, 8).to(chosen.view_dtype) for _ in range(2)]
    Step(model, loss, chosen, micro_batch_size, scaler).backward(views, 12)
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=1))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def tiny_loss(a: Tensor, b: Tensor) -> Tensor:
    """NT-Xent scaled so that its gradients by the projections are below 2^-25, which float16 rounds to 0."""
    return nt_xent(a, b) * 2.0**-24


@pytest.mark.parametrize("micro_batch_size", [None, 5])  # 5: parts of 4, 4 and 4
@pytest.mark.parametrize("loss", [nt_xent, tiny_loss])
def test_scaled_gradients_match_float32(micro_batch_size: int | None, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    exact = gradients(choose_precision("fp32", CPU), GradScaler("cpu", enabled=False), None, loss)
    scaler = GradScaler("cpu", init_scale=2.0**12 if loss is nt_xent else 2.0**36)
    ours = gradients(FP16, scaler, micro_batch_size, loss)
    # 8 float16 roundings of up to 2^-11: inputs, weights, activations and gradients of two layers, and z.
    assert (ours - exact).norm() <= 8 * 2.0**-11 * exact.norm()
    if loss is tiny_loss:
        unscaled = gradients(FP16, GradScaler("cpu", enabled=False), micro_batch_size, loss)
        assert unscaled.norm() < 0.5 * exact.norm(), "gradients vanish without scaling"


@pytest.mark.slow
def test_micro_batches_give_the_gradients_of_the_whole_batch() -> None:
    whole = gradients(FP16, GradScaler("cpu", init_scale=2.0**12), None, nt_xent)
    parts = gradients(FP16, GradScaler("cpu", init_scale=2.0**12), 5, nt_xent)
    assert (whole - parts).norm() <= 2.0**-10 * whole.norm()  # the order of summation changes the rounding


# Runs


def snapshot(training: Trainer) -> list[Tensor]:
    state = training.optimizer.state_dict()["state"]
    buffers = [state[number][name] for number in sorted(state) for name in sorted(state[number])]
    return [tensor.clone() for tensor in (*training.model.parameters(), *buffers)]


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw", "muon"])
@pytest.mark.parametrize("clip", ["none", "1.0"])
def test_overflowing_gradients_skip_the_step(tmp_path: Path, small_encoder: None, optimizer: str, clip: str) -> None:
    training = open_training(tmp_path, f"--optim.name={optimizer}", f"--optim.clip_grad={clip}")
    batch = next(iter(training.loader))
    set_scale(training, 2.0**8)
    initial = snapshot(training)
    assert training.train_step(batch)["grad_scale"] == 2.0**8
    before = snapshot(training)
    assert not torch.equal(before[0], initial[0])

    set_scale(training, 2.0**40)
    measured = training.train_step(batch)
    assert measured["grad_scale"] == 2.0**40
    assert torch.isfinite(measured["loss"])
    assert training.scaler.get_scale() == 2.0**39
    after = snapshot(training)
    assert len(before) == len(after) > 2 * len(list(training.model.parameters())) - 1
    assert all(map(torch.equal, before, after))

    set_scale(training, 2.0**8)
    training.train_step(batch)
    assert not torch.equal(snapshot(training)[0], before[0])


def test_gradients_are_clipped_after_unscaling(tmp_path: Path, small_encoder: None) -> None:
    training = open_training(tmp_path, "--optim.clip_grad=0.1", "--optim.weight_decay=0")
    set_scale(training, 2.0**8)
    before = snapshot(training)
    training.train_step(next(iter(training.loader)))
    change = torch.cat([(w - start).flatten() for w, start in zip(training.model.parameters(), before, strict=True)])
    assert change.norm().item() == pytest.approx(0.1 * 0.01, rel=0.01)  # clip_grad * lr


@pytest.mark.parametrize("frozen", [True, False])
def test_classifier_trains_in_float16(frozen: bool, one_thread: None) -> None:
    source, views = open_source("digits").subset(np.arange(64)), Augmentation.preset("digits")
    schedule = Schedule(epochs=3, lr=0.1, batch_size=16)
    loader = LoaderConfig(batch_size=16, backend="memory")
    losses, features = {}, {}
    for name in ("fp32", "fp16"):
        torch.manual_seed(0)
        classifier = Classifier(SmallEncoder(), 10, frozen=frozen)  # type: ignore[arg-type]
        chosen = choose_precision(name, CPU)
        losses[name] = train_classifier(classifier, source, views, schedule, loader, chosen, title="")
        _, features[name], _ = embed(classifier, source, views, loader, autocast=chosen.autocast)
    assert losses["fp16"][-1] < losses["fp16"][0]
    assert losses["fp16"] != losses["fp32"]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.01)
    assert features["fp16"].dtype == torch.float32
    assert (features["fp16"] - features["fp32"]).norm() <= 0.02 * features["fp32"].norm()


def train_on_a_rank(rank: int, folder: Path) -> list[tuple[float, list[Tensor]]]:
    """Return scale and weights after each of two steps; in the first, only rank 1 overflows."""
    pytest.MonkeyPatch().setattr("fastsimclr.training.build.build", SmallEncoder)
    training = open_training(folder, world=World(rank, 2, CPU))
    set_scale(training, 2.0**8)
    normal = training.stepper
    overflowing = replace(normal, loss=lambda a, b: training.loss(a, b) * 1e9)
    batches = iter(training.loader)
    results = []
    for stepper in (overflowing if rank == 1 else normal, normal):
        training.stepper = stepper
        training.train_step(next(batches))
        results.append((training.scaler.get_scale(), [p.detach().clone() for p in training.model.parameters()]))
    return results


@pytest.mark.slow
def test_ranks_skip_a_step_together(tmp_path: Path) -> None:
    first, second = run_ranks(2, train_on_a_rank, tmp_path)
    assert [scale for scale, _ in first] == [scale for scale, _ in second] == [2.0**7, 2.0**7]
    for (_, ours), (_, theirs) in zip(first, second, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert not all(map(torch.equal, first[0][1], first[1][1])), "the second step is not skipped"


def test_resumed_run_is_bit_identical_including_the_scale(
    tmp_path: Path, small_encoder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The scale decreases for some steps, then doubles every three steps: both parts of the scaler's state are resumed.
    set_scaler_options(monkeypatch, init_scale=2.0**20, growth_interval=3)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(options(whole, "--max_steps=12")) == 0
    for last in (5, 10, 12):
        assert main(options(stopped, f"--max_steps={last}")) == 0
    scales = [line["grad_scale"] for line in steps(whole)]
    assert scales[0] == 2.0**20
    assert scales[1] == 2.0**19, "the first step overflows"
    assert any(after > before for before, after in itertools.pairwise(scales))
    assert [(line["loss"], line["grad_scale"]) for line in steps(stopped)] == [
        (line["loss"], line["grad_scale"]) for line in steps(whole)
    ]
    ours, theirs = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (stopped, whole))
    assert ours["grad_scaler"] == theirs["grad_scaler"]
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in ours["model"].items())


def test_resume_with_another_precision(tmp_path: Path, small_encoder: None) -> None:
    assert main(options(tmp_path, "--max_steps=1", "--precision=fp32")) == 0
    assert main(options(tmp_path, "--max_steps=2", "--resume_changed")) == 0
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["grad_scaler"]["scale"] <= 2.0**16
    assert main(options(tmp_path, "--max_steps=3", "--precision=fp32", "--resume_changed")) == 0
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["grad_scaler"] == {}
    assert [line.get("grad_scale") for line in steps(tmp_path)] == [None, 2.0**16, None]


@pytest.mark.parametrize(
    ("scale", "lr", "expected"),
    [
        (0.5, "0.01", ["grad_scale: got 0.5 at step 1", "expected at least 1"]),
        (4.0, "1e30", ["loss: got nan and", "2 skipped steps in a row"]),
    ],
)
def test_run_that_overflows_float16_ends_with_one_line_error(
    tmp_path: Path,
    small_encoder: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scale: float,
    lr: str,
    expected: Sequence[str],
) -> None:
    set_scaler_options(monkeypatch, init_scale=scale)
    assert (
        main(options(tmp_path, "--max_steps=4", "--max_skipped=2", f"--optim.lr={lr}", "--optim.warmup_epochs=0")) == 2
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(words in line for words in (*expected, "--precision fp32"))
    assert not (tmp_path / "checkpoints" / "last.pt").exists()
