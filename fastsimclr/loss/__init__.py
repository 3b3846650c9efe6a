"""Contrastive losses: NT-Xent here; InfoNCE and SupCon, of the same sums, in modules of their own."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsimclr.loss import fused
from fastsimclr.loss.log_sums import log_negatives, reduce, softmax_losses, unit_rows
from fastsimclr.loss.options import (
    BACKENDS,
    PRECISIONS,
    REDUCTIONS,
    BackendError,
    Computation,
    check_hardness,
    check_projections,
    check_same,
    choose_backend,
    resolve,
)
from fastsimclr.loss.reference import nt_xent_reference
from fastsimclr.loss.supervised import SupConLoss, sup_con
from fastsimclr.loss.tiled import nt_xent_tiled
from fastsimclr.loss.towers import InfoNCELoss, info_nce

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "REDUCTIONS",
    "BackendError",
    "InfoNCELoss",
    "NTXentLoss",
    "SupConLoss",
    "choose_backend",
    "info_nce",
    "nt_xent",
    "sup_con",
]


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
    hardness: float = 0.0,
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
    hardness: weight each negative by exp(hardness * similarity / temperature), relative to the mean weight of the row's
        negatives: beta of Robinson et al., arXiv 2010.04592, with tau_plus = 0. Takes twice the time. 0: no weights.

    Returns a 0-dim or (2N,) tensor in float32 (float64 for float64 inputs). Projections that are not finite, or whose
    norm overflows (1.8e19 in float32), give a non-finite loss, without a CPU-GPU synchronization. Threads may call it
    at the same time; "tiled" with different precisions in two threads runs in one after the other.
    Differentiable once by torch.autograd: "fused" and "tiled" raise RuntimeError on a second derivative, in
    forward-mode AD and in torch.func's grad, jvp, jacrev, ...; vmap calls them once per sample. "reference" has all.
    Raises ValueError for invalid shapes, dtypes or options, or if `backend` cannot compute the loss of these inputs.
    """
    for name, z in (("z1", z1), ("z2", z2)):
        check_projections(name, z)
    check_same("z1 and z2", z1, z2)
    check_hardness(hardness)
    how = resolve(z1, temperature, group, backend, precision, reduction)
    if (decoupled or hardness) and len(z1) == 1 and how.group is None:
        name = "decoupled" if decoupled else "hardness"
        raise ValueError(f"{name}: got N = 1 and no group, so there are no negatives; expected N of at least 2")
    if hardness:
        return _nt_xent_of_hard_negatives(z1, z2, how, hardness, decoupled)
    if how.implementation in ("fused", "emulated"):
        return fused.nt_xent_fused(
            z1, z2, how.temperature_tensor, how.group, how.mean, decoupled, how.precision, how.temperature_value
        )
    tensor = how.temperature_like(z1)
    if how.implementation == "reference":
        return nt_xent_reference(z1, z2, tensor, how.group, how.mean, decoupled)
    return nt_xent_tiled(z1, z2, tensor, how.group, how.mean, decoupled, how.precision, how.temperature_value)


def _nt_xent_of_hard_negatives(z1: Tensor, z2: Tensor, how: Computation, hardness: float, decoupled: bool) -> Tensor:
    with torch.autocast(z1.device.type, enabled=False):
        z = unit_rows(torch.cat([z1, z2]), how)
        negatives = log_negatives(z, None, how, hardness=hardness, partners=True)
        n = len(z1)
        positive = ((z[:n] * z[n:]).sum(1) / how.temperature_like(z)).repeat(2)
        return reduce(softmax_losses(negatives.rows, positive, decoupled), negatives.rows_on_all_ranks, how)


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
        hardness: float = 0.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.group = group
        self.backend = backend
        self.precision = precision
        self.reduction = reduction
        self.decoupled = decoupled
        self.hardness = hardness

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
            hardness=self.hardness,
        )

    def extra_repr(self) -> str:
        temperature = "learned" if isinstance(self.temperature, nn.Parameter) else self.temperature
        return f"temperature={temperature}, backend={self.backend!r}, decoupled={self.decoupled}"
