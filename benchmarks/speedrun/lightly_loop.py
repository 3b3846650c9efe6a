"""lightly's training on CIFAR-10: its transform, DataLoader, model, projection head, loss, and optimizer.

The recipe "lightly" is that of docs/source/getting_started/benchmarks/cifar10_benchmark.py in lightly's repository, for
which it publishes results, as a plain loop instead of Lightning's Trainer. What differs:

- the images are decoded once, and not from files at every step, which is faster;
- the learning rate decays per step, as a budget may end within an epoch;
- there are at most as many workers as cores.

--stem imagenet replaces that script's ResNet-18 by torchvision's, which takes a sixteenth of the operations. The recipe
"paper" is that of the preset cifar10, with lightly's LARS and its schedule.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models import ResNetGenerator
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.models.utils import get_weight_decay_parameters
from lightly.transforms import SimCLRTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, Dataset

from fastsimclr import Augmentation
from fastsimclr.data import open_source
from fastsimclr.data.memory import decode_all
from fastsimclr.data.sources import ArraySource

ENCODER = "encoder.pt"
PUBLISHED_WORKERS = 8
CIFAR10 = Augmentation.preset("cifar10")
CIFAR10_NORMALIZE: dict[str, list[float]] = {"mean": [*CIFAR10.mean], "std": [*CIFAR10.std]}


@dataclass(frozen=True)
class Recipe:
    """What differs between the recipes. optimizer: of a module, for steps and a batch size, with its schedule."""

    batch_size: int
    optimizer: Callable[[nn.Module, int, int], tuple[torch.optim.Optimizer, LRScheduler]]
    normalize: dict[str, list[float]]
    zero_init_residual: bool = False
    """Start the last batch normalization of each residual block at 0, as the authors' code does."""


def published_sgd(model: nn.Module, steps: int, batch_size: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    optimizer = torch.optim.SGD(model.parameters(), lr=6e-2 * batch_size / 128, momentum=0.9, weight_decay=5e-4)
    return optimizer, CosineAnnealingLR(optimizer, steps)


def paper_lars(model: nn.Module, steps: int, _: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    decayed, others = get_weight_decay_parameters([model])
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]  # lightly's LARS adapts only decayed ones
    optimizer = LARS(groups, lr=1.0, momentum=0.9, weight_decay=1e-6)
    return optimizer, CosineWarmupScheduler(optimizer, warmup_epochs=steps // 10, max_epochs=steps)


# lightly's script has batch size 128, for which it publishes a kNN accuracy of 84.7 % after 200 epochs (512: 84.8 %).
RECIPES = {
    "lightly": Recipe(128, published_sgd, IMAGENET_NORMALIZE),
    "paper": Recipe(512, paper_lars, CIFAR10_NORMALIZE, zero_init_residual=True),
}


class Views(Dataset[Any]):
    """Two views of each image of (N, 32, 32, 3) uint8."""

    def __init__(self, images: Tensor, transform: SimCLRTransform) -> None:
        self.images, self.transform = images.numpy(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.images[index]))


def build_backbone(stem: str, *, zero_init_residual: bool = False) -> nn.Module:
    """Build a ResNet-18 without its classifier: images (N, 3, 32, 32) to (N, 512).

    stem: "cifar" for that of lightly's script for CIFAR-10; "imagenet" for torchvision's, as in its other scripts.
    """
    if stem == "imagenet":
        resnet = torchvision.models.resnet18(zero_init_residual=zero_init_residual)
        return nn.Sequential(*list(resnet.children())[:-1], nn.Flatten())
    layers = list(ResNetGenerator("resnet-18").children())[:-1]
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if zero_init_residual:
        for name, module in backbone.named_modules():
            if name.endswith("bn2"):
                nn.init.zeros_(module.weight)  # type: ignore[arg-type]
    return backbone


def train(
    images: Tensor,
    recipe: Recipe,
    backbone: nn.Module,
    batch_size: int,
    *,
    steps: int,
    deadline: float | None,
    workers: int,
) -> list[dict[str, Any]]:
    """Train the backbone, and return the records of the steps.

    images: (N, 32, 32, 3) uint8. deadline: time.monotonic() at which to end, by when two more steps would have fit.
    """
    if len(images) < batch_size:
        raise ValueError(f"batch_size: got {batch_size} for {len(images)} images, expected at most as many")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # as Lightning does
    model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128)).to(device)
    criterion = NTXentLoss()
    optimizer, scheduler = recipe.optimizer(model, steps, batch_size)
    # cj_strength: that of the benchmark's SimCLRCollateFunction.
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0, normalize=recipe.normalize)
    loader: DataLoader[Any] = DataLoader(
        Views(images, transform),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        pin_memory=device.type == "cuda",
    )
    losses: list[Tensor] = []
    times = [time.monotonic()]
    longest = 0.0
    while len(losses) < steps:
        for views in loader:
            x0, x1 = (view.to(device, non_blocking=True) for view in views)
            loss = criterion(model(x0), model(x1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.detach())
            times.append(time.monotonic())
            longest = max(longest, times[-1] - times[-2])
            if len(losses) == steps or (deadline is not None and times[-1] + 2 * longest > deadline):
                return records(losses, times, batch_size)  # waits for the device
    raise AssertionError("unreachable: steps is at least 1")


def records(losses: list[Tensor], times: list[float], batch_size: int) -> list[dict[str, Any]]:
    """Return a record for each step, as in fastsimclr's metrics.jsonl."""
    return [
        {"step": i + 1, "loss": float(losses[i]), "step_ms": 1000 * (times[i + 1] - times[i]), "images": batch_size}
        for i in range(len(losses))
    ]


def load(folder: Path) -> tuple[nn.Module, Augmentation]:
    """Return the backbone that a run has saved, and the augmentation whose evaluation form prepares its images."""
    saved = torch.load(folder / ENCODER, weights_only=True)
    backbone = build_backbone(saved["stem"])
    backbone.load_state_dict(saved["state"])
    normalize = {name: tuple(values) for name, values in saved["normalize"].items()}
    return backbone, Augmentation(**{**vars(CIFAR10), **normalize})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--stem", choices=("cifar", "imagenet"), default="cifar", help="(default: %(default)s)")
    parser.add_argument("--data.train", dest="train", required=True, help="images, as for fastsimclr.train")
    parser.add_argument("--batch_size", type=int, help="(default: that of the recipe)")
    parser.add_argument("--steps", type=int, required=True, help="steps, which the learning rate schedule spans")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--deadline", type=float, help="time.monotonic() at which the run ends (default: none)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the encoder and metrics.jsonl to")
    options = parser.parse_args()
    recipe = RECIPES[options.recipe]
    source = decode_all(open_source(options.train))
    assert isinstance(source, ArraySource)
    torch.manual_seed(options.seed)
    backbone = build_backbone(options.stem, zero_init_residual=recipe.zero_init_residual)
    steps = train(
        source.images,
        recipe,
        backbone,
        options.batch_size or recipe.batch_size,
        steps=options.steps,
        deadline=options.deadline,
        workers=min(PUBLISHED_WORKERS, len(os.sched_getaffinity(0))),
    )
    saved = {"state": backbone.cpu().state_dict(), "stem": options.stem, "normalize": recipe.normalize}
    torch.save(saved, options.output / ENCODER)
    (options.output / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


if __name__ == "__main__":
    main()
