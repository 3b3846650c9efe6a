"""A training step: forward and backward pass, on the whole batch or in micro-batches, and the update of the weights."""

import itertools
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer

from fastsimclr.models import discarded_statistics, divided_momentum
from fastsimclr.precision import Precision, autocast_to
from fastsimclr.profiling import stage
from fastsimclr.sharding import is_sharded, local, norms


@dataclass
class Outputs:
    """The model's outputs of the latest step on this rank, detached."""

    z: list[Tensor] = field(default_factory=list)
    """Projections of each view, (B, D), in float32 or wider."""
    h_parts: list[Tensor] = field(default_factory=list)
    """Representations of the first view of each micro-batch, (micro-batch, F)."""

    @property
    def h(self) -> Tensor:
        """Representations of the first view, (B, F), in the precision of the encoder's output."""
        return torch.cat(self.h_parts)


@dataclass(frozen=True)
class Step:
    """Accumulates the gradients of one batch in the model's parameters."""

    model: Any
    """(N, 3, H, W) -> (N, D); may be compiled or wrapped in DistributedDataParallel."""
    loss: Callable[[Tensor, Tensor], Tensor]
    precision: Precision
    """Precision of the model."""
    micro_batch_size: int | None
    """Images per forward pass, on this rank; None: the whole batch."""
    scaler: GradScaler
    """Scales the gradients of the projections, so that those of the encoder do not underflow in float16. The gradients
    of the parameters remain scaled until `scaler.step` or `scaler.unscale_`. The loss is not scaled, because it is
    computed in float32 and logged."""
    outputs: Outputs | None = None
    """Where to keep the outputs of each step; the model must then be a `SimCLR`. None: nowhere."""
    recomputes: bool = False
    """Whether the model computes activations a second time in the backward pass (--model.checkpoint_stages)."""

    def backward(self, views: Sequence[Tensor], largest_local_batch: int) -> Tensor:
        """Accumulate the gradients and return this rank's loss, detached.

        views: (B, 3, H, W) each. largest_local_batch: the largest B of all ranks in this step; it sets the number of
        micro-batches, so that all ranks enter the same collectives.
        """
        if self.outputs is not None:
            self.outputs.h_parts.clear()
        if self.precision.autocast is None:  # autocast converts the views itself
            views = [view.to(self.precision.dtype) for view in views]
        size = self.micro_batch_size or largest_local_batch
        if size < largest_local_batch:
            return self._in_micro_batches(views, -(-largest_local_batch // size))
        z = self._project(views)
        loss, gradients = self._loss(z)
        self._backward(z, gradients)
        return loss

    def _in_micro_batches(self, views: Sequence[Tensor], parts: int) -> Tensor:
        """Loss and gradients of the whole batch, with the activations of one part in memory at a time.

        GradCache (Gao et al., arXiv 2101.06983): project without a graph, compute dz, then project each part again and
        backpropagate its dz. Both passes of a part have the same random state, and so the same dropout masks. Only the
        second pass updates the running statistics of batch normalization, which all parts together move as one batch.
        """
        pieces = list(zip(*(view.tensor_split(parts) for view in views), strict=True))
        device = views[0].device
        states, projected = [], []
        with torch.no_grad(), discarded_statistics(self.model):
            for piece in pieces:
                states.append(_random_state(device))
                projected.append(self._project(piece))
        loss, dz = self._loss([torch.cat(z_parts) for z_parts in zip(*projected, strict=True)])
        gradients = zip(*(dz_view.tensor_split(parts) for dz_view in dz), strict=True)
        for number, (piece, gradient, state) in enumerate(zip(pieces, gradients, states, strict=True), start=1):
            is_last = number == parts  # DDP averages the gradients in the last backward pass only
            defers = not is_last and isinstance(self.model, DistributedDataParallel)
            _set_random_state(state, device)
            with self.model.no_sync() if defers else nullcontext(), divided_momentum(self.model, parts):
                self._backward(self._project(piece), list(gradient))
        return loss

    def _backward(self, z: list[Tensor], dz: list[Tensor]) -> None:
        """Accumulate the gradients of the parameters. Activations that are recomputed do not count as statistics."""
        with stage("backward"), discarded_statistics(self.model) if self.recomputes else nullcontext():
            torch.autograd.backward(z, self.scaler.scale(dz))

    def _project(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Projections of each view, in float32 or wider. Views of the same size share one forward pass."""
        z: list[Tensor] = [torch.empty(0)] * len(views)
        with stage("forward"):
            for size in dict.fromkeys(view.shape[2:] for view in views):
                numbers = [number for number, view in enumerate(views) if view.shape[2:] == size]
                images = torch.cat([views[number] for number in numbers]).contiguous(memory_format=torch.channels_last)
                with autocast_to(images.device, self.precision.autocast):
                    projected: Tensor = self._forward(images, len(views[0]) if numbers[0] == 0 else 0)
                projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
                for number, z_view in zip(numbers, projected.chunk(len(numbers)), strict=True):
                    z[number] = z_view
        return z

    def _forward(self, images: Tensor, kept: int) -> Tensor:
        """Projections of the images. Keeps the representations of the first `kept` ones in `outputs`."""
        if self.outputs is None:
            return self.model(images)  # type: ignore[no-any-return]
        z, h = self.model(images, return_h=True)
        if kept > 0 and torch.is_grad_enabled():  # in micro-batches, the second pass only
            self.outputs.h_parts.append(h[:kept])
        return z  # type: ignore[no-any-return]

    def _loss(self, projected: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss averaged over all pairs of views, detached, and its gradient for each view's projections.

        Computed separately, so that the loss and the encoder are timed apart.
        """
        with stage("loss"):
            z = [z_view.detach().requires_grad_() for z_view in projected]
            loss = torch.stack([self.loss(a, b) for a, b in itertools.combinations(z, 2)]).mean()
            loss.backward()
            if self.outputs is not None:
                self.outputs.z = [z_view.detach() for z_view in z]
            return loss.detach(), [z_view.grad for z_view in z if z_view.grad is not None]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the states of PyTorch's generators of the CPU and of `device`, if it is a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    cpu, gpu = state
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu, device)


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Seed the generators of PyTorch, NumPy and Python, from which a user's module may draw, too.

    What the model draws in a step, such as dropout masks, is then the same in a resumed run.
    """
    drawn = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    for set_seed in (torch.manual_seed, np.random.seed, random.seed):
        set_seed(drawn)


def update_weights(
    optimizer: Optimizer, scaler: GradScaler, loss: Tensor, max_norm: float | None, world_size: int
) -> dict[str, Tensor]:
    """Update the weights with their gradients, or, on all ranks, nothing if loss or gradients are not finite.

    loss: () of this rank. max_norm: scale the gradients down to this norm over all parameters; None: do not.
    Returns "loss" and "gradient_norm", before the scaling, over all ranks, and for fp16 "grad_scale": () each.
    """
    measured = {}
    if scaler.is_enabled():
        measured["grad_scale"] = scaler.scale(torch.ones_like(loss))  # get_scale() would synchronize with the GPU
    with stage("optimizer"):
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([local(p.grad) for p in parameters])
        if parameters and is_sharded(parameters[0]):
            norm = norms([norm], parameters[0])[0]
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        loss, norm = _mean_over_ranks(loss, norm, world_size)
        step_if_finite(optimizer, (loss + norm).isfinite())
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return measured | {"loss": loss, "gradient_norm": norm}


def _mean_over_ranks(loss: Tensor, norm: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """Average the loss and the gradient's norm, both (), over the ranks: all then decide alike whether to skip a step.

    The norm, in the dtype of the loss, is the same on all ranks unless one of them is damaged.
    """
    both = torch.stack([loss, norm.to(loss)])
    if world_size > 1:
        dist.all_reduce(both)
        both /= world_size
    return both[0], both[1]


def step_if_finite(optimizer: Optimizer, is_finite: Tensor) -> None:
    """Step if `is_finite`, a 0-dim bool tensor, is true.

    On a GPU the optimizer's kernels decide, so that the host need not wait: PyTorch's fused ones, and LARS's.
    """
    if is_finite.device.type == "cpu":
        if is_finite:
            optimizer.step()
        return
    optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined] # the attribute that GradScaler sets
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
