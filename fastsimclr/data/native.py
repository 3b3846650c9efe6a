"""The compiled extension for draws, crops and colours: its functions for CPUs, and its kernels for GPUs.

For tests the kernels also run on the CPU, emulated.
"""

import functools
import warnings
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr import _extension

Implementation = Literal["auto", "compiled", "pytorch", "emulated"]


def is_compiled(device: torch.device) -> bool:
    """Whether the extension computes on `device`."""
    if device.type == "cpu":
        return _extension.compiled is not None
    return not _extension.why_unavailable(device)


def choose(implementation: Implementation, device: torch.device) -> Implementation:
    """compiled or pytorch for "auto"; else what was asked for. Raises RuntimeError if that is not available."""
    if implementation == "auto":
        if is_compiled(device):
            return "compiled"
        if device.type == "cuda":
            warn_once(_extension.why_unavailable(device))
        return "pytorch"
    if (implementation == "compiled" and not is_compiled(device)) or (
        implementation == "emulated" and not _extension.emulated
    ):
        raise RuntimeError(
            f"implementation: got {implementation!r}, which this installation does not have for {device.type}"
        )
    return implementation


@functools.cache
def warn_once(reason: str) -> None:
    warnings.warn(f"views: crops and colors by the slower PyTorch operations ({reason})", stacklevel=2)


def call(function: str, **arguments: Any) -> None:
    """Call `function` of csrc/bindings_views.cpp for CPUs."""
    getattr(_extension.compiled, function)(**arguments)


def launch(kernel: str, device: torch.device, **arguments: Any) -> None:
    """Call `kernel`_cuda of csrc/bindings_views.cpp: on PyTorch's stream, or emulated if `device` is the CPU."""
    if device.type == "cpu":
        getattr(_extension.emulated, f"{kernel}_cuda")(**arguments, device=0, stream=0)
        return
    with torch.cuda.device(device):  # the kernels' CUDA runtime is not PyTorch's, which restores the one before
        getattr(_extension.compiled, f"{kernel}_cuda")(
            **arguments, device=torch.cuda.current_device(), stream=torch.cuda.current_stream().cuda_stream
        )


def constant(name: str) -> int:
    """A constant of the kernels."""
    kernels = _extension.compiled if hasattr(_extension.compiled, name) else _extension.emulated
    return int(getattr(kernels, name))


def pixel_type(dtype: torch.dtype, implementation: Implementation) -> Any:
    """The extension's name for `dtype`."""
    module: Any = _extension.emulated if implementation == "emulated" else _extension.compiled
    return getattr(module.PixelType, str(dtype).removeprefix("torch."))


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on `device`, without waiting for it; of numbers that PyTorch knows."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
