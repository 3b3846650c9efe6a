"""The NT-Xent loss: checks, and the choice of who computes it."""

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsimclr._extension import describe_build, why_unavailable
from fastsimclr.distributed import resolve_group
from fastsimclr.errors import UserError
from fastsimclr.loss import fused
from fastsimclr.loss.reference import nt_xent_reference
from fastsimclr.loss.tiled import nt_xent_tiled

BACKENDS = ("auto", "fused", "tiled", "reference", "emulated")
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

    z1, z2: (N, D), any float dtype; row i of both are the two views of image i. Need not be normalised.
    temperature: positive; a float, or a 0-dim tensor, which gets its gradient.
    group: a process group, or "world": the views of all its ranks are negatives, and batches may be uneven. Each
        rank's loss is its rows' sum * ranks / all rows (with even batches: the mean of its rows), and its gradient is
        that of the sum of all ranks' losses: after DDP's mean over ranks both are exactly those of one process.
        (For "mean", the gradient that arrives at the loss has to be the same on every rank, as it is in DDP.)
    backend: "fused" (CUDA kernels, O(N D) memory), "tiled" (plain PyTorch, O(N D) memory, any device), "reference"
        (dense, O(N^2) memory); "auto" takes the fastest that is there. ("emulated": fused's kernels run on the CPU by a
        developer's build, for tests.)
    precision: of the products, "highest" (float32; fused: the upper 16 bits of each factor, errors of 1e-5) or "medium"
        (bf16; TF32 in tiled on a GPU). "auto": highest, but medium for bf16 and fp16 inputs. "reference" always
        computes in the inputs' dtype, at least float32.
    reduction: "mean", or "none" for each view's loss, (2N,), z1's rows first.
    decoupled: leave the positive out of the denominator (Yeh et al., arXiv 2110.06848).

    Returns a 0-dim or (2N,) tensor, float32 (float64 for float64 inputs). Non-finite projections give a non-finite
    loss, without waiting for the GPU. Differentiable once. Raises ValueError for wrong shapes, dtypes or options.
    """
    _check(z1, z2, temperature, backend, precision, reduction)
    process_group = resolve_group(group)
    if decoupled and len(z1) == 1 and process_group is None:
        raise ValueError("decoupled: got one image and no group, so no view has a negative; expected N > 1")

    value: float | None = None
    if not isinstance(temperature, Tensor):
        value = float(temperature)
    elif temperature.device.type == "cpu" and not torch.compiler.is_compiling():  # in a graph it is a symbol
        value = float(temperature.detach())
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"temperature: got {value}, expected a positive number")

    mean = reduction == "mean"
    chosen = _choose_and_warn(backend, z1.device, z1.dtype, z1.shape[1])
    if precision == "auto":
        precision = "medium" if z1.dtype in (torch.bfloat16, torch.float16) else "highest"
    if chosen in ("fused", "emulated"):
        tensor = temperature if isinstance(temperature, Tensor) else None
        return fused.nt_xent_fused(z1, z2, tensor, process_group, mean, decoupled, precision, value)
    if not isinstance(temperature, Tensor):
        dtype = torch.promote_types(z1.dtype, torch.float32)
        temperature = torch.full((), temperature, dtype=dtype, device=z1.device)
    if chosen == "reference":
        return nt_xent_reference(z1, z2, temperature, process_group, mean, decoupled)
    return nt_xent_tiled(z1, z2, temperature, process_group, mean, decoupled, precision, value)


class BackendError(UserError, RuntimeError):
    """The backend that was asked for by name can't compute this here."""


def choose_backend(
    wanted: str, device: torch.device, dtype: torch.dtype = torch.float32, width: int = 1
) -> tuple[str, str]:
    """Who computes the loss of projections of `width` numbers on `device` if `wanted` is asked for, and why.

    Raises BackendError, a ValueError and a RuntimeError, if "fused" or "emulated" is asked for and can't.
    """
    if wanted in ("tiled", "reference"):
        return wanted, "as asked"
    if wanted == "auto" and device.type != "cuda":
        return "tiled", f"auto: the fused kernel is for CUDA GPUs, and the projections are on {device.type}"
    reason = why_unavailable(device) or fused.unsupported(dtype, width)
    if wanted == "auto":
        return ("tiled", f"auto: {reason}") if reason else ("fused", "auto: the fastest, and it can run here")
    if wanted == "fused" and device.type != "cuda":
        reason = f"it is a CUDA kernel, and the projections are on {device.type}; {describe_build()}"
    if wanted == "emulated" and device.type != "cpu":
        reason = f"it runs on the CPU, and the projections are on {device.type}"
    if reason:
        raise BackendError(f'backend="{wanted}" can\'t compute this: {reason}; use backend="auto" or "tiled"')
    return wanted, "as asked"


@torch.compiler.assume_constant_result  # in a compiled graph: asked once, when it is compiled
def _choose_and_warn(wanted: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    chosen, why = choose_backend(wanted, device, dtype, width)
    if wanted == "auto" and device.type == "cuda" and chosen != "fused":
        warnings.warn(f"nt_xent: the slower backend {chosen!r} ({why})", stacklevel=3)
    return chosen


class NTXentLoss(nn.Module):
    """`nt_xent` as a module: the same arguments, and forward(z1, z2).

    A temperature given as an nn.Parameter is learned.
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
        ("backend", backend, BACKENDS),
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
