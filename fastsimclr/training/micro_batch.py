"""--micro_batch_size auto: the largest micro-batch that fits in memory, found by trials before the first step."""

import copy
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsimclr import memory
from fastsimclr.checkpoint_format import Checkpoint
from fastsimclr.config import Config
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.distributed import World, gather_objects, local_world_size, run_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.loss import NTXentLoss
from fastsimclr.precision import Precision
from fastsimclr.progress_bar import Phase
from fastsimclr.training.build import Learner
from fastsimclr.training.estimate import recorded_activations
from fastsimclr.training.step import Step

_SMALLEST = 2  # images; batch normalization needs more than one of each view
_PROBE_PIXELS = 224**2  # of a small trial on a CPU, which has at least two images
_USED = {"cuda": 0.9, "cpu": 0.65}
"""The part of the available memory to use. The rest is for what the trials do not have: the loader's batches, the
buffers of DistributedDataParallel and NCCL, fragmentation; on a CPU also for the error of the extrapolation."""


def as_resumed(config: Config, checkpoint: Checkpoint | None) -> tuple[Config, list[str]]:
    """Return the configuration with the micro-batch size of the checkpoint instead of auto, and lines to print."""
    if config.micro_batch_size != "auto" or checkpoint is None:
        return config, []
    size = yaml.safe_load(checkpoint.state["config"])["micro_batch_size"]
    images = "the whole batch" if size is None else f"{size} images per rank"
    return replace(config, micro_batch_size=size), [f"micro-batches: {images} (auto: as in {checkpoint.path})"]


@dataclass(frozen=True)
class Trials:
    """Forward and backward passes of random images, by a copy of the model, alone on this rank.

    Weights, gradients, running statistics and random state of the run stay as they are.
    """

    model: nn.Module
    """A SimCLR module, whose batch normalization may be synchronized. It is not compiled in the trials."""
    loss: NTXentLoss
    """The trials compute that of this rank's images only."""
    precision: Precision
    augmentation: Augmentation
    local_batch_size: int
    """The largest of this rank in the run."""
    optimizer_bytes: int
    """Memory that the optimizer allocates in the first step."""
    world: World
    recomputes: bool

    def choose(self) -> tuple[int, str]:
        """Return the largest size that fits, by halving the batch, and the reason.

        On a GPU each trial is a step of the whole batch in micro-batches of that size. On a CPU, where it would take
        long and where Linux kills a process that needs too much, a small trial and one twice its size are extrapolated.
        Raises UserError if not even the smallest size fits.
        """
        device = self.world.device
        available = memory.available_bytes(device)
        if available is None:
            return self.local_batch_size, "the available memory is not known here"
        sharing = 1 if device.type == "cuda" else local_world_size()
        usable = _USED[device.type] * available / sharing - self.optimizer_bytes
        with self._model_and_loss() as (model, loss):
            try:
                needed = (self._measured if device.type == "cuda" else self._extrapolated)(model, loss)
            except OSError:
                return self.local_batch_size, "the peak of the memory cannot be measured here"
            return largest_that_fits(self.local_batch_size, needed, usable)

    def _measured(self, model: nn.Module, loss: nn.Module) -> Callable[[int], float]:
        torch.backends.cudnn.benchmark = True  # as in training; its trials need memory, too

        def needed(size: int) -> float:
            peak = memory.watch_peak(self.world.device)
            try:
                self._step(model, loss, self.local_batch_size, size)
                return peak()
            finally:
                model.zero_grad(set_to_none=True)

        return needed

    def _extrapolated(self, model: nn.Module, loss: nn.Module) -> Callable[[int], float]:
        """Measure two trials that add to existing gradients, as all micro-batches but the first do.

        Otherwise the peak of a small trial would be at the end of its backward pass, when all gradients exist, and that
        of a large one at its start, when all activations do. What autograd saves per image is the least that is needed.
        """
        pixels = sum(recipe.image_size**2 for recipe in self.augmentation.recipes)
        small = max(_SMALLEST, min(self.local_batch_size // 2, _PROBE_PIXELS // pixels))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = sum(parameter.nbytes for parameter in trained)
        # Two batches of views, of which the loader prepares one.
        views = 2 * self.local_batch_size * self.augmentation.channels * pixels * self.precision.view_dtype.itemsize

        peak = memory.watch_peak(self.world.device)
        self._step(model, loss, small, small)
        first = peak()
        peak = memory.watch_peak(self.world.device)  # which returns what the first trial has left in the heap
        with recorded_activations(model) as saved:
            self._step(model, loss, 2 * small, 2 * small)
        per_image = (peak() - first) / small
        if not self.recomputes:  # otherwise what is saved includes all recomputed stages, which do not exist together
            per_image = max(per_image, sum(saved.values()) / (2 * small))
        return lambda size: max(0.0, first + per_image * (size - small)) + gradients + views

    def _step(self, model: nn.Module, loss: nn.Module, images: int, size: int) -> None:
        """Add the gradients of random images, in micro-batches of `size`."""
        shape = images, self.augmentation.channels
        device, dtype = self.world.device, self.precision.view_dtype
        sides = [recipe.image_size for recipe in self.augmentation.recipes]
        views = [torch.rand(*shape, side, side, dtype=dtype, device=device) for side in sides]
        scaler = self.precision.grad_scaler(device)
        Step(model, loss, self.precision, size, scaler, recomputes=self.recomputes).backward(views, images)

    @contextmanager
    def _model_and_loss(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield a copy of the model, and of the loss, that do not communicate: a rank may run out of memory alone."""
        groups = [getattr(module, "process_group", None) for module in self.model.modules()]
        shared = {id(group): group for group in groups if group is not None}  # cannot be copied
        model, loss, group = copy.deepcopy(self.model, shared), copy.copy(self.loss), None
        loss.group = None
        if self.world.world_size > 1:
            group = dist.new_group([self.world.rank], backend="gloo", use_local_synchronization=True)
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.process_group = group  # type: ignore[assignment]
        try:
            with _same_random_state(self.world.device):
                yield model, loss
        finally:
            if group is not None:
                dist.destroy_process_group(group)


def largest_that_fits(batch_size: int, needed: Callable[[int], float], usable: float) -> tuple[int, str]:
    """Return the largest size, of the batch or its halves, quarters, ..., that needs at most `usable` bytes.

    needed: returns the bytes that a size needs, or raises torch.OutOfMemoryError. Returns also the reason.
    Raises UserError if not even the smallest size fits.
    """
    size, reason = batch_size, ""
    while True:
        try:
            peak: float | None = needed(size)
        except torch.OutOfMemoryError:
            peak = None
        if peak is None:
            gc.collect()  # the failed step, to which its exception refers
            too_much = f"{size} run out of memory"
        elif peak <= usable:
            return size, reason or f"the whole batch needs {_gib(peak)} of {_gib(usable)}"
        else:
            too_much = f"{size} need {_gib(peak)} of {_gib(usable)}"
        if size <= _SMALLEST:
            raise UserError(
                f"--micro_batch_size: got auto, but {too_much}; expected room for {size} images: use a smaller "
                "--data.image_size or --model.encoder, or --model.checkpoint_stages"
            )
        size, reason = max(_SMALLEST, -(-size // 2)), too_much


def choose_size(config: Config, learner: Learner, augmentation: Augmentation, world: World) -> tuple[Config, list[str]]:
    """Return the configuration with a number instead of auto, the smallest of all ranks, and lines to print.

    augmentation: with the channels of the images. All ranks call it. Raises UserError on all if nothing fits on one.
    """
    if config.micro_batch_size != "auto":
        return config, []
    values = sum(parameter.numel() for parameter in learner.model.parameters() if parameter.requires_grad)
    trials = Trials(
        learner.model,
        learner.loss,
        learner.precision,
        augmentation,
        local_batch_size=-(-config.batch_size // world.world_size),
        optimizer_bytes=values * learner.precision.dtype.itemsize * (2 if learner.recipe.optimizer == "adamw" else 1),
        world=world,
        recomputes=config.model.checkpoint_stages,
    )
    with Phase("measuring the memory of micro-batches", visible=world.is_rank_zero):
        found = gather_objects(run_on_all_ranks(trials.choose, world), world)
    size, reason = min(found, key=lambda each: each[0])
    return replace(config, micro_batch_size=size), [f"micro-batches: {size} images per rank (auto: {reason})"]


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Restore the state of the generators of PyTorch, NumPy and Python, from which a user's module may draw."""
    states = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
