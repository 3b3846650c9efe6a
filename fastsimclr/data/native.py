"""The compiled extension for draws, crops and colours: its functions for CPUs, and its kernels for GPUs.

For tests the kernels run on the CPU as well, emulated (`fastsimclr._emulated`, of an editable build).
"""

import functools
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

try:
    import fastsimclr._C as _C
except ImportError:
    _C = None  # type: ignore[assignment]
try:
    import fastsimclr._emulated as _emulated
except ImportError:
    _emulated = None  # type: ignore[assignment]

Backend = Literal["auto", "compiled", "pytorch", "emulated"]
OLDEST_GPU = (8, 0)  # that the kernels are compiled for


@functools.cache  # asked for every batch
def is_compiled(device: torch.device) -> bool:
    """Whether the extension computes on `device`."""
    if device.type == "cpu":
        return _C is not None
    if device.type != "cuda" or not hasattr(_C, "photometric_cuda"):
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_GPU


def choose(backend: Backend, device: torch.device) -> Backend:
    """compiled or pytorch for "auto"; else what was asked for. Raises RuntimeError if that is not here."""
    if backend == "auto":
        return "compiled" if is_compiled(device) else "pytorch"
    if (backend == "compiled" and not is_compiled(device)) or (backend == "emulated" and _emulated is None):
        raise RuntimeError(f"backend: got {backend!r}, which this installation does not have for {device.type}")
    return backend


def call(function: str, **arguments: Any) -> None:
    """Call `function` of csrc/bindings_views.cpp for CPUs."""
    getattr(_C, function)(**arguments)


def launch(kernel: str, device: torch.device, **arguments: Any) -> None:
    """Call `kernel`_cuda of csrc/bindings_views.cpp: on PyTorch's stream, or emulated if `device` is the CPU."""
    if device.type == "cpu":
        getattr(_emulated, f"{kernel}_cuda")(**arguments, device=0, stream=0)
        return
    with torch.cuda.device(device):  # the kernels' CUDA runtime is not PyTorch's, which restores the one before
        getattr(_C, f"{kernel}_cuda")(
            **arguments, device=torch.cuda.current_device(), stream=torch.cuda.current_stream().cuda_stream
        )


def constant(name: str) -> int:
    """A constant of the kernels."""
    return int(getattr(_C if hasattr(_C, name) else _emulated, name))


def pixel_type(dtype: torch.dtype, backend: Backend) -> Any:
    """The extension's name for `dtype`."""
    return getattr((_emulated if backend == "emulated" else _C).PixelType, str(dtype).removeprefix("torch."))


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on `device`, without waiting for it; of numbers that PyTorch knows."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
