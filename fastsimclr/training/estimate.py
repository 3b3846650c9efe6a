"""An estimate of a run's time on a CPU, made before the first step."""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.precision import Precision
from fastsimclr.training.step import Step

_PROBE_PIXELS = 8 * 224**2  # enough for a stable rate; about a second of ResNet-50 on two cores
_WARM_UP_SECONDS = 1.0  # a probe this long is not repeated: first-call costs matter little in it


def estimate_step_seconds(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    precision: Precision,
    augmentation: Augmentation,
    batch_size: int,
) -> float:
    """Seconds of a training step on this CPU, from the forward and backward pass of a few random images.

    It excludes data loading and the optimizer. It runs on a copy of the model, which itself does not change.
    """
    sizes = [recipe.image_size for recipe in augmentation.recipes]
    images = min(batch_size, max(2, _PROBE_PIXELS // sum(size**2 for size in sizes)))
    step = Step(copy.deepcopy(model), loss, precision, None, precision.grad_scaler(torch.device("cpu")))
    with torch.random.fork_rng(devices=[]):
        views = [torch.rand(images, 3, size, size, dtype=precision.view_dtype) for size in sizes]
        seconds = _time(step, views)
        if seconds < _WARM_UP_SECONDS:
            seconds = _time(step, views)
    return seconds * batch_size / images


def _time(step: Step, views: list[Tensor]) -> float:
    started = time.perf_counter()
    step.backward(views, len(views[0]))
    return time.perf_counter() - started
