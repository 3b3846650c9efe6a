"""The search for the largest micro-batch that fits in memory (--micro_batch_size auto), with emulated limits."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import run_ranks
from torch import Tensor, nn

from fastsimclr import Augmentation, NTXentLoss, SimCLR, UserError, memory
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.config import parse
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.malloc import keep_freed_memory
from fastsimclr.models import as_encoder
from fastsimclr.precision import choose_precision
from fastsimclr.train import main
from fastsimclr.training.micro_batch import Trials, largest_that_fits
from fastsimclr.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["--data.train=digits", "--data.image_size=8", "--model.hidden=8", "--model.out=8", "--batch_size=21"]
TINY += ["--epochs=1", "--max_steps=1", "--knn_every=0", "--device=cpu", "--precision=fp32", "--log=none"]
AUTO = "--micro_batch_size=auto"
MIB = 2**20


class Measured(nn.Module):
    """An encoder that draws random numbers, and knows the largest batch of images since `images` was set to 0."""

    images = 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU())

    def forward(self, images: Tensor) -> Any:
        random.random()
        np.random.rand()
        Measured.images = max(Measured.images, len(images) // 2)  # both views
        return self.layers(images)


def emulate_memory(available_mib: float) -> pytest.MonkeyPatch:
    """Make a step need 1 MiB per image of its micro-batches, and 2 MiB more."""

    def watch_peak(device: torch.device) -> Callable[[], int]:
        Measured.images = 0
        return lambda: (Measured.images + 2) * MIB

    patch = pytest.MonkeyPatch()
    patch.setattr(memory, "watch_peak", watch_peak)
    patch.setattr(memory, "available_bytes", lambda device: int(available_mib * MIB))
    return patch


def refuse_trials() -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    patch.setattr(memory, "available_bytes", lambda device: pytest.fail("a trial"))
    return patch


@pytest.mark.parametrize(
    ("fitting", "size", "reason"),
    [
        (21, 21, "the whole batch needs 0.00 GiB of 1.00 GiB"),
        (20, 11, "21 run out of memory"),
        (3, 3, "6 run out of memory"),
        (2, 2, "3 run out of memory"),
    ],
)
def test_size_is_halved_while_memory_runs_out(fitting: int, size: int, reason: str) -> None:
    def needed(size: int) -> float:
        if size > fitting:
            raise torch.OutOfMemoryError
        return 0

    assert largest_that_fits(21, needed, 2**30) == (size, reason)


def test_size_is_halved_while_it_needs_too_much() -> None:
    assert largest_that_fits(64, lambda size: size * 2**30, 20 * 2**30) == (16, "32 need 32.00 GiB of 20.00 GiB")
    with pytest.raises(UserError, match=r"got auto, but 2 need 2\.00 GiB of 1\.00 GiB; expected room for 2 images"):
        largest_that_fits(64, lambda size: size * 2**30, 2**30)


def generators_and_gradients(trainer: Trainer) -> list[Any]:
    numpy_state: Any = np.random.get_state()
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    return [torch.get_rng_state().tolist(), numpy_state[1].tolist(), random.getstate(), gradients]


@pytest.mark.parametrize(("available", "size"), [(1000, 21), (25, 11), (7, 2)])
def test_trials_leave_the_run_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], available: float, size: int
) -> None:
    trainers, states = [], []
    for option in ("none", "auto"):
        torch.manual_seed(0)
        encoder = Measured()  # whose construction draws numbers
        np.random.seed(0)
        random.seed(0)
        options = [*TINY, f"--micro_batch_size={option}", f"--output={tmp_path / option}"]
        patch = emulate_memory(available) if option == "auto" else refuse_trials()
        trainers.append(Trainer(parse(options), SINGLE_PROCESS, encoder=encoder))
        patch.undo()
        states.append(generators_and_gradients(trainers[-1]))
    assert states[0] == states[1]
    first, second = (trainer.model.state_dict() for trainer in trainers)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    trainer = trainers[1]
    assert not trainer.optimizer.state
    assert trainer.config.micro_batch_size == trainer.stepper.micro_batch_size == size
    trainer.train()
    assert capsys.readouterr().out.count(f"\nmicro-batches: {size} images per rank (auto: ") == 1
    assert yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["micro_batch_size"] == size


def test_resumed_run_takes_the_size_of_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = f"--model.encoder={Path(__file__)}:Measured"
    options = [*TINY, reference, f"--output={tmp_path}"]
    patch = emulate_memory(25)
    assert main([*options, AUTO]) == 0
    patch.undo()
    patch = refuse_trials()
    for steps, option in ((2, AUTO), (3, "--micro_batch_size=11"), (4, AUTO)):
        assert main([*options, option, f"--max_steps={steps}"]) == 0
        saved = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
        assert saved["step"] == steps
        assert yaml.safe_load(saved["config"])["micro_batch_size"] == 11
    patch.undo()
    assert "micro-batches: 11 images per rank (auto: as in " in capsys.readouterr().out
    assert main([*options, "--micro_batch_size=6", "--max_steps=5"]) == 2
    assert "--micro_batch_size was 11, is 6: refused" in capsys.readouterr().out


def extrapolate(_: int, kept_mib: int) -> float:
    """Return the memory that 256 images are predicted to need, in a process whose malloc has kept freed memory."""
    keep_freed_memory()
    torch.ones(kept_mib * MIB // 4)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4096), *(nn.Sigmoid() for _ in range(32)))
    model = SimCLR(as_encoder(layers, image_size=64, channels=3), nn.Linear(4096, 8))
    precision = choose_precision("fp32", torch.device("cpu"))
    trials = Trials(model, NTXentLoss(), precision, Augmentation(image_size=64), 256, 0, SINGLE_PROCESS, False)
    return trials._extrapolated(model, NTXentLoss())(256)


@pytest.mark.parametrize("kept_mib", [0, 512])
@pytest.mark.slow
def test_extrapolation_covers_a_larger_step(kept_mib: int) -> None:
    """In a new process, as every run of the command is: in one with a history, the heap is in fragments."""
    (needed,) = run_ranks(1, extrapolate, kept_mib)
    activations = 256 * 2 * 33 * 4096 * 4  # of the linear layer and the sigmoids, in float32
    fixed = (
        2 * 4096 * 3 * 64 * 64 * 4 + 256 * 2 * 3 * 64 * 64 * 4 * 3
    )  # gradients, once more while they are added; views
    assert activations < needed < 1.5 * (activations + fixed)


def per_rank(rank: int, folder: Path) -> tuple[Any, int]:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    patch = emulate_memory((1000, 25)[rank])  # each has half of it, and uses 65%
    options = [*TINY, AUTO, f"--output={folder}"]
    trainer = Trainer(parse(options), World(rank, 2, torch.device("cpu")), encoder=Measured())
    trainer.train()
    patch.undo()
    return trainer.config.micro_batch_size, trainer.progress.step


@pytest.mark.slow
def test_ranks_take_the_smallest_of_their_sizes(tmp_path: Path) -> None:
    """Of a local batch of 11, rank 1 has room for 6: 8 MiB of 8.1, where 11 images need 13."""
    assert run_ranks(2, per_rank, tmp_path) == [(6, 1), (6, 1)]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["micro_batch_size"] == 6
