"""The NT-Xent loss: input checks, and the choice of its implementation."""

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsimclr._extension import describe_build, why_unavailable
from fastsimclr.distributed import resolve_group
from fastsimclr.errors import UserError
from fastsimclr.loss import fused
from fastsimclr.loss.autograd_modes import is_in_transform
from fastsimclr.loss.reference import nt_xent_reference
from fastsimclr.loss.tiled import nt_xent_tiled

BACKENDS = ("auto", "fused", "tiled", "reference")
PRECISIONS = ("auto", "highest", "medium")
REDUCTIONS = ("mean", "none")


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    group: dist.ProcessGroup | str | None = None,
    backend: str = "auto",
    precision: str = "auto",
    reduction: str = "mean",
    decoupled: bool = False,
) -> Tensor:
    """NT-Xent loss of two batches of projections (SimCLR, eq. 1), averaged over the 2N views.

    Equivalent to, with z = F.normalize(torch.cat([z1, z2]), dim=1) and i's positive (i + N) mod 2N:
        s = (z @ z.T / temperature).fill_diagonal_(-inf);  F.cross_entropy(s, positive)

    z1, z2: (N, D), any float dtype; z1[i] and z2[i] are the two views of image i. They need not be normalized.
    temperature: positive float, or a 0-dim tensor, which gets a gradient if it requires one.
    group: process group, or "world", whose ranks contribute negatives; local batch sizes may differ. The loss on each
        rank is the sum over its rows * number of ranks / number of rows on all ranks (the mean over its rows if batches
        are equal), and its gradient is that of the sum of all ranks' losses. After DDP's average over ranks, loss and
        gradient equal those of a single process with the whole batch. With reduction="mean", the gradient that
        arrives at the loss must be the same on every rank, as it is in DDP.
    backend: "fused" (CUDA kernels, O(N D) memory), "tiled" (PyTorch, O(N D) memory, any device), "reference" (PyTorch,
        O(N^2) memory), or "auto", the fastest available.
    precision: precision of the matrix products. "highest": float32 (fused: the upper 16 bits of each factor, errors of
        1e-5). "medium": bf16 (tiled on a GPU: TF32). "auto": "medium" for bf16 and fp16 inputs, otherwise "highest".
        "reference" ignores it and computes in the inputs' dtype, at least float32.
    reduction: "mean", or "none" to return the loss of each view, (2N,), z1's rows first.
    decoupled: if True, leave the positive out of the denominator (Yeh et al., arXiv 2110.06848).

    Returns a 0-dim or (2N,) tensor in float32 (float64 for float64 inputs). Projections that are not finite, or whose
    norm overflows (1.8e19 in float32), give a non-finite loss, without a CPU-GPU synchronization. Threads may call it
    at the same time; "tiled" with different precisions in two threads runs in one after the other.
    Differentiable once by torch.autograd: "fused" and "tiled" raise RuntimeError on a second derivative, in
    forward-mode AD and in torch.func's grad, jvp, jacrev, ...; vmap calls them once per sample. "reference" has all.
    Raises ValueError for invalid shapes, dtypes or options, or if `backend` cannot compute the loss of these inputs.
    """
    _check(z1, z2, temperature, backend, precision, reduction)
    process_group = resolve_group(group)
    if decoupled and len(z1) == 1 and process_group is None:
        raise ValueError("decoupled: got N = 1 and no group, so there are no negatives; expected N of at least 2")

    value: float | None = None
    if not isinstance(temperature, Tensor):
        value = float(temperature)
    elif temperature.device.type == "cpu" and not (torch.compiler.is_compiling() or is_in_transform()):
        value = float(temperature.detach())
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"temperature: got {value}, expected a positive number")

    mean = reduction == "mean"
    implementation = _choose_and_warn(backend, z1.device, z1.dtype, z1.shape[1])
    if precision == "auto":
        precision = "medium" if z1.dtype in (torch.bfloat16, torch.float16) else "highest"
    if implementation in ("fused", "emulated"):
        tensor = temperature if isinstance(temperature, Tensor) else None
        return fused.nt_xent_fused(z1, z2, tensor, process_group, mean, decoupled, precision, value)
    if not isinstance(temperature, Tensor):
        dtype = torch.promote_types(z1.dtype, torch.float32)
        temperature = torch.full((), temperature, dtype=dtype, device=z1.device)
    if implementation == "reference":
        return nt_xent_reference(z1, z2, temperature, process_group, mean, decoupled)
    return nt_xent_tiled(z1, z2, temperature, process_group, mean, decoupled, precision, value)


class BackendError(UserError, RuntimeError):
    """The requested backend cannot compute the loss of these projections on this device."""


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
        warnings.warn(f"nt_xent: using the slower backend {implementation!r} ({reason})", stacklevel=3)
    return implementation


class NTXentLoss(nn.Module):
    """NT-Xent loss (SimCLR, eq. 1) as a module: forward(z1, z2), each (N, D), returns the loss.

    The arguments are those of `nt_xent`. A temperature that is an nn.Parameter becomes a parameter of the module and is
    learned.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        group: dist.ProcessGroup | str | None = None,
        backend: str = "auto",
        precision: str = "auto",
        reduction: str = "mean",
        decoupled: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.group = group
        self.backend = backend
        self.precision = precision
        self.reduction = reduction
        self.decoupled = decoupled

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(
            z1,
            z2,
            self.temperature,
            group=self.group,
            backend=self.backend,
            precision=self.precision,
            reduction=self.reduction,
            decoupled=self.decoupled,
        )

    def extra_repr(self) -> str:
        temperature = "learned" if isinstance(self.temperature, nn.Parameter) else self.temperature
        return f"temperature={temperature}, backend={self.backend!r}, decoupled={self.decoupled}"


def _check(z1: Tensor, z2: Tensor, temperature: float | Tensor, backend: str, precision: str, reduction: str) -> None:
    for name, got, expected in (
        ("backend", "auto" if backend == "emulated" else backend, BACKENDS),  # "emulated" is for tests
        ("precision", precision, PRECISIONS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if got not in expected:
            raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(expected)}")
    for name, z in (("z1", z1), ("z2", z2)):
        if not isinstance(z, Tensor) or not z.dtype.is_floating_point or z.dtype.itemsize == 1:
            kind = str(z.dtype) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"{name}: got {kind}, expected a tensor of float32, float64, bfloat16 or float16")
        if z.ndim != 2 or z.shape[0] < 1 or z.shape[1] < 1:
            raise ValueError(f"{name}: got shape {tuple(z.shape)}, expected (N, D) with N and D at least 1")
    if z1.shape != z2.shape or z1.dtype != z2.dtype or z1.device != z2.device:
        raise ValueError(
            f"z1 and z2: got {tuple(z1.shape)} {z1.dtype} on {z1.device} and {tuple(z2.shape)} {z2.dtype} on "
            f"{z2.device}, expected the same shape, dtype and device"
        )
    if isinstance(temperature, Tensor) and (temperature.ndim != 0 or not temperature.dtype.is_floating_point):
        raise ValueError(
            f"temperature: got a {temperature.dtype} tensor of shape {tuple(temperature.shape)}, "
            "expected a float or a 0-dim float tensor"
        )
