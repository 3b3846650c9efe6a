"""A step's forward and backward: views to projections to the loss, at once or in micro-batches."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from fastsimclr.precision import Precision, autocast_to
from fastsimclr.profiling import stage


@dataclass(frozen=True)
class Step:
    """Accumulates the gradients of one batch in the model's parameters."""

    model: Any
    """(N, 3, H, W) -> (N, D), perhaps compiled, perhaps in DistributedDataParallel."""
    loss: Callable[[Tensor, Tensor], Tensor]
    precision: Precision
    """The model's."""
    micro_batch_size: int | None
    """Images that go through the model at a time; None: all."""
    scaler: GradScaler
    """Multiplies the gradients of the projections, so that the encoder's do not vanish in float16. The parameters'
    gradients are left scaled: `scaler.step` or `scaler.unscale_` divides them. The loss is never scaled: it is computed
    in float32, and its value is what is logged."""

    def backward(self, views: Sequence[Tensor], largest_local_batch: int) -> Tensor:
        """This rank's loss, detached. views: (B, 3, H, W) each; largest_local_batch: of all ranks in this step, so that
        each takes as many micro-batches, and enters as many collectives, as the others."""
        if self.precision.autocast is None:  # autocast converts the views itself
            views = [view.to(self.precision.dtype) for view in views]
        size = self.micro_batch_size or largest_local_batch
        if size < largest_local_batch:
            return self._in_micro_batches(views, -(-largest_local_batch // size))
        z = self._project(views)
        loss, gradients = self._loss(z)
        with stage("backward"):
            torch.autograd.backward(z, self.scaler.scale(gradients))
        return loss

    def _in_micro_batches(self, views: Sequence[Tensor], parts: int) -> Tensor:
        """The whole batch's loss and gradients with the activations of one part at a time (GradCache, Gao et al.,
        arXiv 2101.06983): project without a graph, take the loss's gradient by each z, project again and pass it on."""
        pieces = list(zip(*(view.tensor_split(parts) for view in views), strict=True))
        with torch.no_grad():
            projected = [self._project(piece) for piece in pieces]
        loss, of_views = self._loss([torch.cat(parts_of_view) for parts_of_view in zip(*projected, strict=True)])
        gradients = zip(*(of_view.tensor_split(parts) for of_view in of_views), strict=True)
        for number, (piece, gradient) in enumerate(zip(pieces, gradients, strict=True), start=1):
            waits = number < parts and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if waits else nullcontext():
                z = self._project(piece)
                with stage("backward"):
                    torch.autograd.backward(z, self.scaler.scale(gradient))
        return loss

    def _project(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Projections of each view, at least float32. Views of one size go through the model together."""
        z: list[Tensor] = [torch.empty(0)] * len(views)
        with stage("forward"):
            for size in dict.fromkeys(view.shape[2:] for view in views):
                numbers = [number for number, view in enumerate(views) if view.shape[2:] == size]
                images = torch.cat([views[number] for number in numbers]).contiguous(memory_format=torch.channels_last)
                with autocast_to(images.device, self.precision.autocast):
                    projected: Tensor = self.model(images)
                projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
                for number, of_view in zip(numbers, projected.chunk(len(numbers)), strict=True):
                    z[number] = of_view
        return z

    def _loss(self, projected: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The mean over the pairs of views, detached, and its gradient by each view's projections: by itself, so that
        its time is told from the encoder's."""
        with stage("loss"):
            z = [of_view.detach().requires_grad_() for of_view in projected]
            loss = torch.stack([self.loss(a, b) for a, b in itertools.combinations(z, 2)]).mean()
            loss.backward()
            return loss.detach(), [of_view.grad for of_view in z if of_view.grad is not None]
