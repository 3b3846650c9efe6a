"""A fake CUDA GPU for host code: tensors have a shape, dtype and device, but no values (PyTorch's FakeTensors).

    with fake_cuda() as device:                  # on any machine whose PyTorch is built for CUDA; no GPU is needed
        z = torch.randn(4, 8, device=device)
        z + torch.ones(4, 8)                     # FakeTensorDeviceMismatchError, as a GPU would raise

The compiled extension is replaced by functions that check that each pointer belongs to a tensor on the GPU. Values,
streams, events, pinned memory and the kernels themselves are not covered.
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
    """Return make(*arguments, **options) with real tensors on the CPU, inside `fake_cuda`."""
    with unset_fake_temporarily():
        return make(*arguments, **options)


@contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[torch.device]:
    """Make PyTorch and fastsimclr report one GPU of this compute capability; yield its device."""
    with pytest.MonkeyPatch.context() as patch:
        # Otherwise PyTorch would initialize CUDA because of the patches below.
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
            "mem_get_info": lambda device=None: (2**33, 2**34),
            **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_reserved"), lambda device=None: 0),
            **dict.fromkeys(("empty_cache", "reset_peak_memory_stats"), lambda device=None: None),
            "get_rng_state": lambda device=None: None,
            "set_rng_state": lambda state, device=None: None,
        }.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(Tensor, "pin_memory", lambda self: self)
        patch.setattr(Tensor, "data_ptr", lambda self: _Pointer(self.device))
        # Values that the host reads from tensors. item: GradScaler found no overflow; int: the last of ten classes;
        # bool: LBFGS has converged.
        for name, value in {"item": 0.0, "__float__": 0.0, "__int__": 9, "__bool__": True}.items():
            patch.setattr(Tensor, name, _reader(getattr(Tensor, name), value))
        patch.setattr(torch, "_fused_sgd_", _fused_sgd)  # PyTorch's has no fake implementation
        patch.setattr(torch.autograd, "backward", backward)
        patch.setattr(GradScaler, "get_scale", lambda self: 2.0**16)
        patch.setattr(_extension, "compiled", _Kernels())
        _clear_caches()
        try:
            with _Mode(allow_non_fake_inputs=True):  # tensors from NumPy are real
                yield GPU
        finally:
            _clear_caches()


def _reader(original: Callable[[Tensor], Any], value: float) -> Callable[[Tensor], Any]:
    def read(self: Tensor) -> Any:
        try:
            return original(self)
        except DataDependentOutputException:
            return value

    return read


def _fused_sgd(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], *, found_inf: Tensor | None = None, **_: Any
) -> None:
    for tensor in (*params, *grads, *momenta, *([] if found_inf is None else [found_inf])):
        if tensor.device != GPU:
            raise ValueError(f"got a tensor on {tensor.device}, expected {GPU}")


def _clear_caches() -> None:
    _extension.why_unavailable.cache_clear()
    native.warn_once.cache_clear()


def backward(
    tensors: Tensor | Sequence[Tensor], gradients: Tensor | Sequence[Tensor] | None = None, *_: Any, **__: Any
) -> None:
    """Replace torch.autograd.backward as far as it is used here: PyTorch's own queries the driver for streams."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gradients = [gradients] * len(tensors) if gradients is None or isinstance(gradients, Tensor) else list(gradients)
    accumulated: dict[Any, dict[int, Tensor]] = {}

    def accumulate(node: Any, index: int, gradient: Tensor) -> None:
        expected = node._input_metadata[index]  # the engine also casts and reduces gradients to this dtype and shape
        gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
        if gradient.device != expected.device:
            raise ValueError(f"got a gradient on {gradient.device}, expected {expected.device} for {node}")
        inputs = accumulated.setdefault(node, {})
        inputs[index] = inputs[index] + gradient if index in inputs else gradient

    with torch.no_grad():
        edges = [get_gradient_edge(tensor) for tensor in tensors]
        for tensor, edge, gradient in zip(tensors, edges, gradients, strict=True):
            accumulate(edge.node, edge.output_nr, torch.ones_like(tensor) if gradient is None else gradient)
        for node in _topological_order([edge.node for edge in edges]):
            inputs = [accumulated.get(node, {}).get(index) for index in range(len(node._input_metadata))]
            if all(gradient is None for gradient in inputs):
                continue
            # Nodes of Python functions are called through `apply`.
            outputs = getattr(node, "apply", node)(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for (following, index), gradient in zip(node.next_functions, outputs, strict=False):
                if following is not None and gradient is not None:
                    accumulate(following, index, gradient)


def _topological_order(roots: Sequence[Any]) -> list[Any]:
    """Return all nodes of the graph, each before the nodes that receive its gradients."""
    done: dict[Any, None] = {}
    stack = [(node, False) for node in roots]
    while stack:
        node, is_expanded = stack.pop()
        if is_expanded:
            done[node] = None
        elif node not in done:
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following not in (None, *done)]
    return list(reversed(done))


class _Mode(FakeTensorMode):
    """Also checks the devices of multi-tensor operators, which PyTorch's own mode does not."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach_" in func.__name__:
            for group in zip(*(argument for argument in args if isinstance(argument, list | tuple)), strict=False):
                devices = {str(each.device) for each in group if isinstance(each, Tensor) and each.ndim > 0}
                if len(devices) > 1:
                    raise RuntimeError(f"{func}: got tensors on {' and '.join(sorted(devices))}, expected one device")
        return super().dispatch(func, types, args, kwargs)


class _Pointer(int):
    """An address with its device."""

    device: torch.device

    def __new__(cls, device: torch.device) -> "_Pointer":
        pointer = super().__new__(cls, 1)
        pointer.device = device
        return pointer


class _Kernels:
    """Replaces fastsimclr._C of any build. CPU functions are real; kernels only check the devices of their pointers."""

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
        return 1  # for functions that return how the work is split: one column per unit, one split


class _Event:
    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "_Event") -> float:
        return 1.0
