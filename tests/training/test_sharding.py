"""Runs whose weights are sharded (--distributed fsdp), compared with runs of DistributedDataParallel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from torch import Tensor, nn
from training.test_step import step
from weights import metrics, steps

from fastsimclr import SimCLR, UserError, load_encoder
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.config import parse
from fastsimclr.distributed import World
from fastsimclr.optim import build_optimizer
from fastsimclr.sharding import is_sharded, local, shard, sharded_like, whole
from fastsimclr.training.callbacks import Callback, TrainerInterface
from fastsimclr.training.trainer import Trainer

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
TINY = ["--data.image_size=16", "--model.encoder=resnet18", "--model.width=0.25", "--model.stem=imagenet"]
TINY += ["--model.hidden=32", "--model.out=16", "--batch_size=21", "--epochs=3", "--max_steps=5", "--knn_every=0"]
TINY += ["--device=cpu", "--precision=fp64", "--log=none"]
VARIANTS = [
    ["--knn_every=1"],  # LARS, synchronized batch normalization
    ["--optim.name=adamw", "--optim.clip_grad=0.01", "--micro_batch_size=3"],
    ["--optim.name=muon", "--model.checkpoint_stages", "--model.freeze_epochs=1"],
    ["--optim.name=sgd", "--optim.lr=0.1", "--model.sync_bn=false", "--data.num_views=3", "--knn_every=1"],
    [
        "--model.encoder=timm/vit_tiny_patch16_224",
        "--model.width=1",
        "--model.stem=auto",
        "--model.freeze=patch_embed",
        "--knn_every=1",
    ],
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """84 images in two classes: four batches of 21."""
    folder = tmp_path_factory.mktemp("images")
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (84, 16, 16, 3), dtype=np.uint8)):
        file = folder / f"class{number % 2}" / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder


def train(rank: int, world_size: int, output: Path, *options: str, **objects: Any) -> Trainer:
    trainer = Trainer(parse([*TINY, *options, f"--output={output}"]), World(rank, world_size, CPU), **objects)
    trainer.train()
    return trainer


def compare_on_rank(rank: int, world_size: int, images: Path, folder: Path) -> None:
    for number, options in enumerate(VARIANTS):
        for distributed in ("ddp", "fsdp"):
            output = folder / f"{distributed}-{number}"
            train(rank, world_size, output, f"--data.train={images}", f"--distributed={distributed}", *options)


@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_runs_equal_those_of_ddp(images: Path, tmp_path: Path, world_size: int) -> None:
    """Five steps, with uneven batches of 21: weights, optimizer states, running statistics, losses, accuracies."""
    run_ranks(world_size, compare_on_rank, world_size, images, tmp_path)
    for number, options in enumerate(VARIANTS):
        ddp, fsdp = (tmp_path / f"{distributed}-{number}" for distributed in ("ddp", "fsdp"))
        expected, state = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (ddp, fsdp))
        for state_dict in (state, expected):
            state_dict["optimizer"] = state_dict["optimizer"]["state"]  # "fused" may differ among the options
        for part in ("model", "optimizer", "probe"):
            torch.testing.assert_close(state[part], expected[part], rtol=1e-8, atol=1e-10, msg=f"{part} {options}")
        for ours, theirs in zip(steps(fsdp), steps(ddp), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-10)
            assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-8)
        measured = [[line for line in metrics(run) if "knn_accuracy" in line] for run in (fsdp, ddp)]
        for ours, theirs in zip(*measured, strict=True):
            assert ours["knn_accuracy"] == theirs["knn_accuracy"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 5, 3)

    def forward(self, maps: Tensor) -> Any:
        return self.conv(maps).relu()


class Small(nn.Module):
    """An encoder with two blocks, and parameters with fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.stem = nn.Conv2d(3, 5, 3)
        self.blocks = nn.Sequential(nn.Sequential(Block()), Block())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 7))

    def forward(self, images: Tensor) -> Any:
        return self.head(self.blocks(self.stem(images * self.scale)))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return SimCLR(Small(), nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 6))).double()


def views(rank: int, world_size: int) -> list[Tensor]:
    """This rank's part of 21 images in three views, of two sizes."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(3, 21, 3, 12, 12, dtype=torch.float64, generator=generator)
    return [view.tensor_split(world_size)[rank] for view in (*drawn[:2], drawn[2, :, :, :10, :10])]


def gradients_on_rank(rank: int, world_size: int) -> list[list[Tensor]]:
    """Return the whole gradients of a step in micro-batches of different sizes."""
    results = []
    for size in (None, 1, 3, 7):
        model = small_model()
        shard(model)
        step(model, size).backward(views(rank, world_size), -(-21 // world_size))
        results.append([whole(parameter.grad) for parameter in model.parameters() if parameter.grad is not None])
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_micro_batches_of_sharded_weights_equal_the_plain_step(world_size: int) -> None:
    model = small_model()
    step(model, None).backward(views(0, 1), 21)
    expected = [parameter.grad for parameter in model.parameters()]
    for results in run_ranks(world_size, gradients_on_rank, world_size):
        for ours in results:
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def optimizers_on_rank(rank: int) -> None:
    for name in ("lars", "sgd", "adamw", "muon"):
        models = [small_model(), small_model()]
        shard(models[1])
        optimizers = [build_optimizer(name, model.parameters(), 0.1, 0.9, 0.1) for model in models]
        for found_inf in (0.0, 1.0, 0.0):
            generator = torch.Generator().manual_seed(2)
            gradients = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in models[0].parameters()]
            if found_inf:
                gradients[0].fill_(torch.nan)
            for model in models:
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = sharded_like(gradient.clone(), parameter)
            if not found_inf:
                optimizers[0].step()
            optimizers[1].found_inf = torch.tensor(found_inf)  # as on a GPU, where the kernels decide
            optimizers[1].step()
            plain, sharded = ([whole(p.detach()) for p in model.parameters()] for model in models)
            torch.testing.assert_close(sharded, plain, rtol=0, atol=1e-12, msg=f"{name} {found_inf}")
            states = [state for state in optimizers[1].state.values() if "momentum_buffer" in state]
            assert all(is_sharded(state["momentum_buffer"]) for state in states)


def test_optimizers_skip_a_step_that_is_not_finite_on_all_ranks() -> None:
    run_ranks(2, optimizers_on_rank)


class Represent(Callback):
    """Keeps the representations of fixed images by the encoder that callbacks get."""

    def on_epoch(self, trainer: TrainerInterface, record: dict[str, Any]) -> None:
        with torch.no_grad():
            self.h = trainer.encoder().eval()(torch.linspace(0, 1, 3 * 16 * 16).double().view(1, 3, 16, 16))
        trainer.model.train()


def resumed_on_rank(rank: int, images: Path, folder: Path) -> tuple[Tensor, int, int]:
    """Train in one go, and in two with the other way to train on several ranks, each with three optimizers.

    Returns representations of the sharded run, and the numbers of values that this rank keeps and that all do.
    """
    for name in ("adamw", "muon", "sgd"):
        options = [f"--data.train={images}", f"--optim.name={name}"]
        for first, then in (("ddp", "fsdp"), ("fsdp", "ddp")):
            output = folder / f"{name}-{first}"
            train(rank, 2, output, *options, f"--distributed={first}", "--max_steps=2")
            train(rank, 2, output, *options, f"--distributed={then}")
        train(rank, 2, folder / f"{name}-one", *options, "--distributed=fsdp", "--max_steps=2")
        train(rank, 2, folder / name, *options)
    options = [f"--data.train={images}", "--optim.name=adamw", "--model.sync_bn=false", "--distributed=fsdp"]
    represent = Represent()
    trainer = train(rank, 2, folder / "fsdp", *options, callbacks=[represent])
    tensors = [*trainer.model.parameters()]
    for state in trainer.optimizer.state.values():
        tensors += [state["exp_avg"], state["exp_avg_sq"]]
    return represent.h, sum(local(tensor).numel() for tensor in tensors), sum(tensor.numel() for tensor in tensors)


def test_checkpoints_are_those_of_ddp(images: Path, tmp_path: Path) -> None:
    """A run resumes from those of either way, also with one process, and load_encoder reads them without ranks."""
    results = run_ranks(2, resumed_on_rank, images, tmp_path)
    for name in ("adamw", "muon", "sgd"):
        expected = load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")
        one = [f"--data.train={images}", f"--optim.name={name}", "--distributed=fsdp"]
        train(0, 1, tmp_path / f"{name}-one", *one)
        for first in ("ddp", "fsdp", "one"):
            state = load_checkpoint(tmp_path / f"{name}-{first}" / "checkpoints" / "last.pt")
            torch.testing.assert_close(state["model"], expected["model"], rtol=0, atol=1e-10)
            torch.testing.assert_close(state["optimizer"]["state"], expected["optimizer"]["state"], rtol=0, atol=1e-10)
    encoder = load_encoder(tmp_path / "fsdp").double()
    h = encoder(torch.linspace(0, 1, 3 * 16 * 16).double().view(1, 3, 16, 16))
    for of_rank, kept, values in results:
        torch.testing.assert_close(of_rank, h.detach(), rtol=0, atol=1e-5)  # the encoder was loaded in float32
        assert 0.49 < kept / values < 0.51


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Any:
        return self.scale * images.flatten(1)


def refused_on_rank(rank: int, images: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"parameters without dimensions \(module.scale\)"):
        train(rank, 2, folder / "run", f"--data.train={images}", "--distributed=fsdp", encoder=Scaled())


def test_parameters_without_dimensions_are_refused(images: Path, tmp_path: Path) -> None:
    run_ranks(2, refused_on_rank, images, tmp_path)
