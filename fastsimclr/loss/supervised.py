"""The supervised contrastive loss, with several positives per row."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsimclr.distributed import all_gather_rows, gather_rows
from fastsimclr.loss.log_sums import log_negatives, reduce, unit_rows
from fastsimclr.loss.options import check_projections, resolve


def sup_con(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    group: dist.ProcessGroup | str | None = None,
    backend: str = "auto",
    precision: str = "auto",
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrastive loss (Khosla et al., arXiv 2004.11362, eq. 2): rows of the same label are positives.

    For each row i, the mean over its positives p of -log( exp(s_ip) / sum over all j other than i of exp(s_ij) ), where
    s is the cosine similarity divided by temperature. A row without positives has loss 0, and counts in the mean.

    z: (N, D), any float dtype; need not be normalized. Several views of an image are rows with the same label.
    labels: (N,), integers, on the device of z.
    Other arguments as in `nt_xent`; with a group, rows of other ranks are positives, too. The memory is O(N D), except
    for backend="reference". The authors' code multiplies the loss by temperature / 0.07.

    Returns a 0-dim tensor, or (N,) with reduction="none".
    Raises ValueError for invalid shapes, dtypes or options, or for a single row without a group.
    """
    check_projections("z", z)
    if not isinstance(labels, Tensor) or labels.shape != z.shape[:1] or labels.is_floating_point():
        kind = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: got {kind}, expected a tensor of {len(z)} integers")
    if labels.device != z.device:
        raise ValueError(f"labels: got a tensor on {labels.device}, expected {z.device}, as z")
    how = resolve(z, temperature, group, backend, precision, reduction)
    if len(z) == 1 and how.group is None:
        raise ValueError("z: got N = 1 and no group, expected at least 2 rows")

    with torch.autocast(z.device.type, enabled=False):
        z = unit_rows(z, how)
        others = log_negatives(z, None, how)
        sizes = others.rows_on_all_ranks
        all_z, all_labels, first = z, labels, 0
        if how.group is not None:
            all_z, all_labels = gather_rows(z, sizes, how.group), all_gather_rows(labels, sizes, how.group)
            first = sum(sizes[: dist.get_rank(how.group)])
        of_row = _classes(all_labels)
        mine = of_row[first : first + len(z)]
        sums = torch.zeros_like(all_z).index_add(0, of_row, all_z)  # of each class
        counts = torch.zeros_like(all_z[:, 0]).index_add(0, of_row, torch.ones_like(all_z[:, 0]))
        positives = counts[mine] - 1
        to_positives = ((z * (sums[mine] - z)).sum(1)) / how.temperature_like(z)
        losses = torch.where(positives > 0, others.rows - to_positives / positives.clamp_min(1), 0.0)
        return reduce(losses, sizes, how)


def _classes(labels: Tensor) -> Tensor:
    """Return the rank of each row's label among the distinct labels, (N,), without a CPU-GPU synchronization."""
    ordered, order = labels.sort()
    is_new = torch.cat([ordered.new_zeros(1, dtype=torch.int64), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(order).scatter_(0, order, is_new.cumsum(0))


class SupConLoss(nn.Module):
    """Supervised contrastive loss as a module: forward(z, labels), (N, D) and (N,), returns the loss.

    The arguments are those of `sup_con`. A temperature that is an nn.Parameter becomes a parameter of the module and is
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
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.group = group
        self.backend = backend
        self.precision = precision
        self.reduction = reduction

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return sup_con(
            z,
            labels,
            self.temperature,
            group=self.group,
            backend=self.backend,
            precision=self.precision,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        temperature = "learned" if isinstance(self.temperature, nn.Parameter) else self.temperature
        return f"temperature={temperature}, backend={self.backend!r}"
