"""The training loops of bench_train.py: fastsimclr, and lightly's examples/pytorch/simclr.py with torchvision's model.

lightly's loop has its transform in a DataLoader, its loss, SGD and float32; each view is a separate forward pass.
"""

import copy
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from benchmarks.nt_xent_contenders import dense
from benchmarks.suite import CORES, DEVICE
from benchmarks.view_peers import EachImage, Loader, Setting, lightly_transform, open_loader, open_pillow
from fastsimclr import Augmentation, SimCLR, encoder, projector
from fastsimclr.data import ViewLoader, open_views
from fastsimclr.data.sources import ArraySource
from fastsimclr.loss import NTXentLoss
from fastsimclr.models.cpu_conv import SmallMapConv2d
from fastsimclr.optim import build_optimizer
from fastsimclr.precision import choose_precision
from fastsimclr.training.step import Step

LR = 0.06  # as in lightly's example
NO_SCALER = GradScaler(DEVICE.type, enabled=False)


def simclr(name: str, stem: str, image_size: int) -> SimCLR:
    """Build a model, with the same weights in each call."""
    torch.manual_seed(0)
    backbone = encoder(name, 1, stem, image_size=image_size)
    return SimCLR(backbone, projector(backbone.out_features)).to(DEVICE)


def with_plain_convolutions(model: SimCLR) -> SimCLR:
    """Replace fastsimclr's convolutions of small feature maps by nn.Conv2d, as in torchvision's model, in place."""
    for module in model.modules():
        if isinstance(module, SmallMapConv2d):
            module.__class__ = nn.Conv2d
    return model


@dataclass
class Contender:
    """A training loop and its model."""

    model: SimCLR
    optimizer: torch.optim.Optimizer
    batches: Callable[[], Iterable[Sequence[Tensor]]]
    """Returns the batches of an epoch, each of two views (B, 3, H, W)."""
    backward: Callable[[Sequence[Tensor]], Tensor]
    """Computes the gradients of a batch; returns its loss, detached."""
    dtype: torch.dtype = torch.float32
    """Dtype of the views, and of the model's matrix products."""
    joint_batch_norm: bool = True
    """Whether both views pass through the model, and so its BatchNorm, in one batch."""

    def update(self, views: Sequence[Tensor]) -> Tensor:
        loss = self.backward(views)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def epoch(self) -> None:
        losses = [self.update(views) for views in self.batches()]
        float(torch.stack(losses).mean())  # waits for the device, as logging does

    def loss(self, views: Sequence[Tensor]) -> float:
        """Return the loss of these views, in the precision that is timed."""
        loss = self.backward([view.to(self.dtype) for view in views])
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)


def fastsimclr_loop(
    model: SimCLR,
    batches: Callable[[], Iterable[Sequence[Tensor]]],
    temperature: float,
    precision: str,
    micro_batch_size: int | None = None,
) -> Contender:
    """The step of fastsimclr.train at its defaults, except for the optimizer, which is that of lightly's example."""
    chosen = choose_precision(precision, DEVICE)
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = Step(model, NTXentLoss(temperature, precision="highest"), chosen, micro_batch_size, NO_SCALER)
    return Contender(
        model,
        build_optimizer("sgd", model.parameters(), LR, momentum=0.0, weight_decay=0.0),
        batches,
        lambda views: step.backward(views, len(views[0])),
        chosen.view_dtype,
    )


def view_batches(loader: ViewLoader) -> Callable[[], Iterator[Sequence[Tensor]]]:
    return lambda: (batch.views for batch in loader)


def lightly_loader(source: ArraySource, augmentation: Augmentation, batch_size: int) -> Loader:
    images = EachImage(tuple(source.images.numpy()), open_pillow, lightly_transform(augmentation))
    return open_loader(images, Setting(augmentation, batch_size, CORES), drop_last=True)


def lightly_loop(model: SimCLR, loader: Loader, temperature: float, *, tuned: bool) -> Contender:
    """lightly's loop. tuned: with bf16 autocast and channels-last, which take two lines of code."""
    from lightly.loss import NTXentLoss as LightlyLoss

    model = with_plain_convolutions(copy.deepcopy(model))
    layout = torch.channels_last if tuned else torch.preserve_format
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    criterion = LightlyLoss(temperature=temperature)

    def backward(views: Sequence[Tensor]) -> Tensor:
        x0, x1 = (view.to(DEVICE, torch.float32, memory_format=layout) for view in views)
        with torch.autocast(DEVICE.type, torch.bfloat16) if tuned else nullcontext():
            z0 = model(x0)
            z1 = model(x1)
            loss: Tensor = criterion(z0, z1)
        loss.backward()
        return loss.detach()

    return Contender(
        model,
        torch.optim.SGD(model.parameters(), lr=LR),
        lambda: loader,
        backward,
        torch.bfloat16 if tuned else torch.float32,
        joint_batch_norm=False,
    )


def small_views() -> Augmentation:
    """The preset cifar10, with bilinear interpolation, which lightly's transform hardcodes (torchvision's default)."""
    preset = Augmentation.preset("cifar10")
    return Augmentation(**{**vars(preset), "interpolation": "bilinear"})


def open_small_views(source: ArraySource, augmentation: Augmentation, batch_size: int, precision: str) -> ViewLoader:
    dtype = choose_precision(precision, DEVICE).view_dtype
    return open_views(source, augmentation, batch_size, device=DEVICE, drop_last=True, dtype=dtype)


def large_step(batch_size: int, micro_batch_size: int, name: str) -> Callable[[], float]:
    """Return a step of ResNet-18 at 32x32 in micro-batches, with the loss "ours" or "dense".

    The step returns the loss and does not change the weights.
    """
    torch.manual_seed(0)
    model = simclr("resnet18", "imagenet", 32).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    chosen = choose_precision("auto", DEVICE)
    loss = {"ours": NTXentLoss(0.1, precision="highest"), "dense": dense}[name]
    step = Step(model, loss, chosen, micro_batch_size, NO_SCALER)
    views = [torch.randn(batch_size, 3, 32, 32, device=DEVICE).to(chosen.view_dtype) for _ in range(2)]

    def run() -> float:
        loss = float(step.backward(views, batch_size))
        model.zero_grad(set_to_none=True)
        return loss

    # Exclude one-time allocations, such as threads and their scratch memory.
    step.backward([view[: 2 * micro_batch_size] for view in views], 2 * micro_batch_size)
    model.zero_grad(set_to_none=True)
    return run


def fits_in_memory(batch_size: int, micro_batch_size: int, name: str, limit_mib: float) -> bool:
    """Return whether the step fits into limit_mib beyond the memory held before it.

    The limit stays in force: call this in a process of its own.
    """
    run = large_step(batch_size, micro_batch_size, name)
    if DEVICE.type == "cuda":
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + limit_mib * 2**20) / total)
    else:
        status = Path("/proc/self/status").read_text()
        held = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (int(held * 2**10 + limit_mib * 2**20),) * 2)
    try:
        run()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the message of torch's CPU allocator
            raise
        return False
    return True
