"""Runs whose weights are sharded (--distributed fsdp), compared with runs of DistributedDataParallel."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import RankError, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from weights import metrics, steps

from fastsimclr import SimCLR, UserError, load_encoder
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.config import parse
from fastsimclr.distributed import World
from fastsimclr.optim import build_optimizer
from fastsimclr.sharding import is_sharded, local, shard, whole
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
    ["--model.encoder=timm/vit_tiny_patch16_224", "--model.width=1", "--model.stem=auto", "--model.freeze=patch_embed"],
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


def train(rank: int, world_size: int, output: Path, *options: str) -> Trainer:
    trainer = Trainer(parse([*TINY, *options, f"--output={output}"]), World(rank, world_size, CPU))
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
        for part in ("model", "optimizer", "probe"):
            torch.testing.assert_close(state[part], expected[part], rtol=1e-8, atol=1e-10, msg=f"{part} {options}")
        for ours, theirs in zip(steps(fsdp), steps(ddp), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-10)
            assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-8)
        measured = [[line for line in metrics(run) if "knn_accuracy" in line] for run in (fsdp, ddp)]
        for ours, theirs in zip(*measured, strict=True):
            assert ours["knn_accuracy"] == theirs["knn_accuracy"]
