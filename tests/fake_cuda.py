"""A CUDA GPU for host code alone: tensors with shapes, dtypes and a device, but no numbers (PyTorch's FakeTensors).

    with fake_cuda() as device:                  # on any machine whose PyTorch is built for CUDA; no GPU is needed
        z = torch.randn(4, 8, device=device)
        z + torch.ones(4, 8)                     # FakeTensorDeviceMismatchError, as a GPU would raise

The compiled extension is replaced by functions that check that each pointer is one of a tensor on the GPU. What is not
covered: numbers, streams, events, pinned memory, and the kernels themselves.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.amp import GradScaler
from torch.autograd.graph import get_gradient_edge

from fastsimclr import _extension
from fastsimclr.data import native

Result = TypeVar("Result")

GPU = torch.device("cuda", 0)


def real(make: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """make(*arguments, **options) with real tensors on the CPU, within `fake_cuda`."""
    with unset_fake_temporarily():
        return make(*arguments, **options)


@contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[torch.device]:
    """Make PyTorch and fastsimclr find one GPU of that compute capability; yields its device."""
    with pytest.MonkeyPatch.context() as patch:
        # Otherwise PyTorch would believe the answers below and initialize CUDA.
        patch.setattr(FakeTensorMode, "avoid_device_init", True)
        stream = types.SimpleNamespace(cuda_stream=0)
        for name, answer in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "current_stream": lambda device=None: stream,
            "device": lambda device: nullcontext(),
            "get_device_capability": lambda device=None: capability,
            "get_device_name": lambda device=None: "a fake GPU",
            "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= (8, 0),
            "Event": _Event,
        }.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(Tensor, "pin_memory", lambda self: self)
        patch.setattr(Tensor, "data_ptr", lambda self: _Pointer(self.device))
        # What the host reads of tensors that have no numbers. item: GradScaler found no overflow; int: the last of ten
        # classes; bool: LBFGS has converged.
        for name, number in {"item": 0.0, "__float__": 0.0, "__int__": 9, "__bool__": True}.items():
            patch.setattr(Tensor, name, _reader(getattr(Tensor, name), number))
        patch.setattr(torch.autograd, "backward", backward)
        patch.setattr(GradScaler, "get_scale", lambda self: 2.0**16)
        patch.setattr(_extension, "compiled", _Kernels())
        _forget_the_gpus()
        try:
            with _Mode(allow_non_fake_inputs=True):  # what NumPy gives is real
                yield GPU
        finally:
            _forget_the_gpus()


def _reader(original: Callable[[Tensor], Any], number: float) -> Callable[[Tensor], Any]:
    def read(self: Tensor) -> Any:
        try:
            return original(self)
        except DataDependentOutputException:
            return number

    return read


def _forget_the_gpus() -> None:
    _extension.why_unavailable.cache_clear()
    native.warn_once.cache_clear()


def backward(
    tensors: Tensor | Sequence[Tensor], gradients: Tensor | Sequence[Tensor] | None = None, *_: Any, **__: Any
) -> None:
    """torch.autograd.backward, as far as it is used here: PyTorch's own asks the GPU's driver for its streams."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gradients = [gradients] * len(tensors) if gradients is None or isinstance(gradients, Tensor) else list(gradients)
    arrived: dict[Any, dict[int, Tensor]] = {}

    def arrive(node: Any, place: int, gradient: Tensor) -> None:
        expected = node._input_metadata[place]  # as the engine makes a gradient fit what it is the gradient of
        gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
        if gradient.device != expected.device:
            raise ValueError(f"got a gradient on {gradient.device}, expected {expected.device} for {node}")
        at = arrived.setdefault(node, {})
        at[place] = at[place] + gradient if place in at else gradient

    with torch.no_grad():
        edges = [get_gradient_edge(tensor) for tensor in tensors]
        for tensor, edge, gradient in zip(tensors, edges, gradients, strict=True):
            arrive(edge.node, edge.output_nr, torch.ones_like(tensor) if gradient is None else gradient)
        for node in _in_order([edge.node for edge in edges]):
            inputs = [arrived.get(node, {}).get(place) for place in range(len(node._input_metadata))]
            if all(gradient is None for gradient in inputs):
                continue
            # Functions written in Python are called by `apply`.
            outputs = getattr(node, "apply", node)(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for (following, place), gradient in zip(node.next_functions, outputs, strict=False):
                if following is not None and gradient is not None:
                    arrive(following, place, gradient)


def _in_order(roots: Sequence[Any]) -> list[Any]:
    """Every node of the graph, each before those that its gradients go to."""
    done: dict[Any, None] = {}
    waiting = [(node, False) for node in roots]
    while waiting:
        node, is_left = waiting.pop()
        if is_left:
            done[node] = None
        elif node not in done:
            waiting.append((node, True))
            waiting += [(following, False) for following, _ in node.next_functions if following not in (None, *done)]
    return list(reversed(done))


class _Mode(FakeTensorMode):
    """Checks the devices of multi-tensor operators as well, which PyTorch's own mode does not."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach_" in func.__name__:
            for together in zip(*(argument for argument in args if isinstance(argument, list | tuple)), strict=False):
                devices = {str(each.device) for each in together if isinstance(each, Tensor) and each.ndim > 0}
                if len(devices) > 1:
                    raise RuntimeError(f"{func}: got tensors on {' and '.join(sorted(devices))}, expected one device")
        return super().dispatch(func, types, args, kwargs)


class _Pointer(int):
    """An address that knows its device."""

    device: torch.device

    def __new__(cls, device: torch.device) -> "_Pointer":
        pointer = super().__new__(cls, 1)
        pointer.device = device
        return pointer


class _Kernels:
    """In place of fastsimclr._C, of any build. What is for the CPU is real; kernels check where their pointers lead."""

    DataType = PixelType = types.SimpleNamespace(float32=0, bfloat16=1, float16=2)
    MAX_BLUR_RADIUS = LUMA_PARTS = 64
    sample_params = staticmethod(_extension.compiled.sample_params) if _extension.compiled else None

    def probe(self, device: int) -> str:
        return ""

    def build_info(self) -> dict[str, Any]:
        return {"cuda": "13.0", "architectures": ["sm_90"], "compiler": "none"}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nt_xent_") or name.endswith("_cuda"):
            return lambda **arguments: self._launch(name, arguments)
        raise AttributeError(name)

    @staticmethod
    def _launch(name: str, arguments: dict[str, Any]) -> int:
        for argument, value in arguments.items():
            for pointer in value if isinstance(value, tuple) else (value,):
                if isinstance(pointer, _Pointer) and pointer.device != GPU:
                    raise ValueError(f"{name}: {argument} is on {pointer.device}, expected {GPU}")
        return 1  # of what asks how the work is cut: one column a unit, one split


class _Event:
    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "_Event") -> float:
        return 1.0
