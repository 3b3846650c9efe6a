"""Calls of the compiled extension for views (random parameters, crops, colors): CPU functions and GPU kernels.

For tests, the GPU kernels can also run emulated on the CPU.
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
    """Return whether the extension can run on `device`."""
    if device.type == "cpu":
        return _extension.compiled is not None
    return not _extension.why_unavailable(device)


def choose(implementation: Implementation, device: torch.device) -> Implementation:
    """Resolve "auto" to "compiled" or "pytorch". Raises RuntimeError if the requested one is not available."""
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
            f"implementation: got {implementation!r}, which is not available for {device.type} in this installation"
        )
    return implementation


@functools.cache
def warn_once(reason: str) -> None:
    warnings.warn(f"views: crops and colors use slower PyTorch operations ({reason})", stacklevel=2)


def call(function: str, **arguments: Any) -> None:
    """Call a CPU function of csrc/bindings_views.cpp."""
    getattr(_extension.compiled, function)(**arguments)


def launch(kernel: str, device: torch.device, **arguments: Any) -> None:
    """Call `kernel`_cuda of csrc/bindings_views.cpp on PyTorch's current stream; emulated if `device` is the CPU."""
    if device.type == "cpu":
        getattr(_extension.emulated, f"{kernel}_cuda")(**arguments, device=0, stream=0)
        return
    with torch.cuda.device(device):  # restores the current device, which the kernels' own CUDA runtime changes
        getattr(_extension.compiled, f"{kernel}_cuda")(
            **arguments, device=torch.cuda.current_device(), stream=torch.cuda.current_stream().cuda_stream
        )


def constant(name: str) -> int:
    """Return a constant of the kernels."""
    kernels = _extension.compiled if hasattr(_extension.compiled, name) else _extension.emulated
    return int(getattr(kernels, name))


def pixel_type(dtype: torch.dtype, implementation: Implementation) -> Any:
    """Return the extension's enum value for `dtype`."""
    module: Any = _extension.emulated if implementation == "emulated" else _extension.compiled
    return getattr(module.PixelType, str(dtype).removeprefix("torch."))


def value_type(dtype: torch.dtype) -> Any:
    """Return the extension's enum value for pixels of `dtype`."""
    module: Any = _extension.compiled
    return getattr(module.ValueType, str(dtype).removeprefix("torch."))


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array, whose dtype PyTorch supports, to a tensor on `device` without synchronizing."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
