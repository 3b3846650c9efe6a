"""The options that all losses share: their checks, and the choice of the implementation."""

import math
import warnings
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from fastsimclr._extension import describe_build, why_unavailable
from fastsimclr.distributed import resolve_group
from fastsimclr.errors import UserError
from fastsimclr.loss import fused
from fastsimclr.loss.autograd_modes import is_in_transform

BACKENDS = ("auto", "fused", "tiled", "reference")
PRECISIONS = ("auto", "highest", "medium")
REDUCTIONS = ("mean", "none")


class BackendError(UserError, RuntimeError):
    """The requested backend cannot compute the loss of these projections on this device."""


@dataclass(frozen=True)
class Computation:
    """How a loss is computed: its options, checked, with the defaults replaced by what they stand for."""

    implementation: str
    """fused, tiled, reference, or, in tests, emulated."""
    precision: str
    """highest or medium."""
    temperature: float | Tensor
    temperature_value: float | None
    """The temperature, if known without waiting for a GPU."""
    group: dist.ProcessGroup | None
    """None for a single process."""
    mean: bool

    @property
    def temperature_tensor(self) -> Tensor | None:
        return self.temperature if isinstance(self.temperature, Tensor) else None

    def temperature_like(self, z: Tensor) -> Tensor:
        """Return the temperature as a 0-dim tensor: the one that was given, or a new one on the device of z."""
        if isinstance(self.temperature, Tensor):
            return self.temperature
        return torch.full((), self.temperature, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)

    def with_temperature_divided_by(self, divisor: float) -> "Computation":
        value = None if self.temperature_value is None else self.temperature_value / divisor
        return replace(self, temperature=self.temperature / divisor, temperature_value=value)


def resolve(
    z: Tensor,
    temperature: float | Tensor,
    group: dist.ProcessGroup | str | None,
    backend: str,
    precision: str,
    reduction: str,
) -> Computation:
    """Return how to compute a loss of checked projections z (N, D). Raises ValueError for invalid options."""
    for name, got, expected in (
        ("backend", "auto" if backend == "emulated" else backend, BACKENDS),  # "emulated" is for tests
        ("precision", precision, PRECISIONS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if got not in expected:
            raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(expected)}")
    value = _read(temperature)
    process_group = resolve_group(group)
    implementation = _choose_and_warn(backend, z.device, z.dtype, z.shape[1])
    if precision == "auto":
        precision = "medium" if z.dtype in (torch.bfloat16, torch.float16) else "highest"
    return Computation(implementation, precision, temperature, value, process_group, reduction == "mean")


def check_projections(name: str, z: Tensor) -> None:
    """Raise ValueError if z is not a tensor of floats (N, D) with N and D of at least 1."""
    if not isinstance(z, Tensor) or not z.dtype.is_floating_point or z.dtype.itemsize == 1:
        kind = str(z.dtype) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"{name}: got {kind}, expected a tensor of float32, float64, bfloat16 or float16")
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"{name}: got shape {tuple(z.shape)}, expected (N, D) with N and D at least 1")


def check_same(names: str, a: Tensor, b: Tensor, *, shape: bool = True) -> None:
    """Raise ValueError unless a and b have the same dtype, device and shape, or number of columns."""
    first = 0 if shape else 1
    if a.shape[first:] != b.shape[first:] or (a.dtype, a.device) != (b.dtype, b.device):
        raise ValueError(
            f"{names}: got {tuple(a.shape)} {a.dtype} on {a.device} and {tuple(b.shape)} {b.dtype} on {b.device}, "
            f"expected the same {'shape' if shape else 'number of columns'}, dtype and device"
        )


def check_hardness(hardness: float) -> None:
    if not (hardness >= 0 and math.isfinite(hardness)):
        raise ValueError(f"hardness: got {hardness}, expected a number of at least 0")


def _read(temperature: float | Tensor) -> float | None:
    """Return the temperature, or None if that would wait for a GPU. Raises ValueError if it is invalid."""
    if not isinstance(temperature, Tensor):
        value = float(temperature)
    elif temperature.ndim != 0 or not temperature.dtype.is_floating_point:
        raise ValueError(
            f"temperature: got a {temperature.dtype} tensor of shape {tuple(temperature.shape)}, "
            "expected a float or a 0-dim float tensor"
        )
    elif temperature.device.type != "cpu" or torch.compiler.is_compiling() or is_in_transform():
        return None
    else:
        value = float(temperature.detach())
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"temperature: got {value}, expected a positive number")
    return value


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float32, width: int = 1
) -> tuple[str, str]:
    """Return the implementation used for `backend`, and the reason, for projections (N, `width`) on `device`.

    Raises BackendError, a ValueError and a RuntimeError, if a backend other than "auto" is requested and cannot run.
    """
    if backend in ("tiled", "reference"):
        return backend, "as requested"
    if backend == "auto" and device.type != "cuda":
        return "tiled", f"auto: the fused kernels need a CUDA GPU, and the projections are on {device.type}"
    reason = why_unavailable(device) or fused.unsupported(dtype, width)
    if backend == "auto":
        return ("tiled", f"auto: {reason}") if reason else ("fused", "auto: the fastest available")
    if backend == "fused" and device.type != "cuda":
        reason = f"it needs a CUDA GPU, and the projections are on {device.type}; {describe_build()}"
    if backend == "emulated" and device.type != "cpu":
        reason = f"it runs on the CPU, and the projections are on {device.type}"
    if reason:
        raise BackendError(f'got backend="{backend}", which cannot run: {reason}; use backend="auto" or "tiled"')
    return backend, "as requested"


@torch.compiler.assume_constant_result  # in a compiled graph: evaluated once, at compile time
def _choose_and_warn(backend: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    implementation, reason = choose_backend(backend, device, dtype, width)
    if backend == "auto" and device.type == "cuda" and implementation != "fused":
        warnings.warn(f"loss: using the slower backend {implementation!r} ({reason})", stacklevel=4)
    return implementation
