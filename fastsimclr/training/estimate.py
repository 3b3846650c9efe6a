"""An estimate of a step's time and memory on a CPU, made before the first step."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.precision import Precision
from fastsimclr.training.step import Step

_PROBE_PIXELS = 4 * 224**2  # a second or two of ResNet-50 on two cores, of which the first call takes most


@dataclass(frozen=True)
class Estimate:
    step_seconds: float
    """Excludes data loading and the optimizer."""
    activation_bytes: float
    """Memory that autograd saves for the backward pass, per image with all its views."""


@contextmanager
def recorded_activations(model: nn.Module) -> Iterator[dict[int, int]]:
    """Yield the bytes, by address, that autograd saves in the block for the backward pass, without the weights."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        yield saved


def estimate_step(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    precision: Precision,
    augmentation: Augmentation,
    batch_size: int,
) -> Estimate:
    """Measure the forward and backward pass of a few random images, with a copy of the model on the CPU."""
    sizes = [recipe.image_size for recipe in augmentation.recipes]
    images = max(2, min(batch_size // 4, _PROBE_PIXELS // sum(size**2 for size in sizes)))
    step = Step(copy.deepcopy(model), loss, precision, None, precision.grad_scaler(torch.device("cpu")))
    with torch.random.fork_rng(devices=[]):
        views = [torch.rand(images, augmentation.channels, size, size, dtype=precision.view_dtype) for size in sizes]
        with recorded_activations(step.model) as saved:
            step.backward(views, images)  # not timed: the first call allocates memory and compiles kernels
        started = time.perf_counter()
        step.backward(views, images)
        seconds = time.perf_counter() - started
    return Estimate(seconds * batch_size / images, sum(saved.values()) / images)
