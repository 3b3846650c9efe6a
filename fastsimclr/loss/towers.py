"""InfoNCE: the contrastive loss of two encoders' outputs, as in CLIP and MoCo."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsimclr.loss.log_sums import log_negatives, reduce, softmax_losses, unit_rows
from fastsimclr.loss.options import check_hardness, check_projections, check_same, resolve


def info_nce(
    a: Tensor,
    b: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    symmetric: bool = True,
    queue: Tensor | None = None,
    batch_negatives: bool = True,
    group: dist.ProcessGroup | str | None = None,
    backend: str = "auto",
    precision: str = "auto",
    reduction: str = "mean",
    decoupled: bool = False,
    hardness: float = 0.0,
) -> Tensor:
    """InfoNCE loss (van den Oord et al., arXiv 1807.03748) of two towers: b[i] is the positive of a[i].

    Equivalent to, with a, b = F.normalize(a, dim=1), F.normalize(b, dim=1) and labels = torch.arange(N):
        s = a @ b.T / temperature;  (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2

    a, b: (N, D), any float dtype, such as images and texts. They need not be normalized.
    symmetric: if True, the loss of CLIP: each row of a among the rows of b, and each row of b among the rows of a. If
        False, only the former.
    queue: (K, D), more negatives of each row of a, such as keys of earlier batches; with symmetric=False only. It gets
        a gradient if it requires one. With a group, it is this rank's own.
    batch_negatives: if False, the rows of the queue are the only negatives, as in MoCo (arXiv 1911.05722).
    Other arguments as in `nt_xent`. The memory is O((N + K) D), except for backend="reference".

    Returns a 0-dim tensor, or with reduction="none" (N,), or (2N,) if symmetric, with the losses of a first.
    Raises ValueError for invalid shapes, dtypes or options, or if there are no negatives.
    """
    for name, z in (("a", a), ("b", b)):
        check_projections(name, z)
    check_same("a and b", a, b)
    check_hardness(hardness)
    if queue is not None:
        check_projections("queue", queue)
        check_same("a and queue", a, queue, shape=False)
        if symmetric:
            raise ValueError(
                "queue: got one with symmetric=True, expected symmetric=False: a queue has negatives for a only"
            )
    elif not batch_negatives:
        raise ValueError("batch_negatives: got False without a queue, so there are no negatives; expected a queue")
    how = resolve(a, temperature, group, backend, precision, reduction)
    if len(a) == 1 and how.group is None and queue is None:
        raise ValueError(
            "a and b: got N = 1, no group and no queue, so there are no negatives; expected N of at least 2"
        )

    with torch.autocast(a.device.type, enabled=False):
        a, b = unit_rows(a, how), unit_rows(b, how)
        extra = None if queue is None else unit_rows(queue, how)
        negatives = log_negatives(
            a, b, how, hardness=hardness, columns=symmetric, extra=extra, among_columns=batch_negatives
        )
        positive = (a * b).sum(1) / how.temperature_like(a)
        losses = softmax_losses(negatives.rows, positive, decoupled)
        if symmetric:
            losses = torch.cat([losses, softmax_losses(negatives.columns, positive, decoupled)])
        return reduce(losses, negatives.rows_on_all_ranks, how, per_row=2 if symmetric else 1)


class InfoNCELoss(nn.Module):
    """InfoNCE loss as a module: forward(a, b), each (N, D), or forward(a, b, queue) with a queue (K, D).

    The arguments are those of `info_nce`. A temperature that is an nn.Parameter becomes a parameter of the module and
    is learned.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        symmetric: bool = True,
        batch_negatives: bool = True,
        group: dist.ProcessGroup | str | None = None,
        backend: str = "auto",
        precision: str = "auto",
        reduction: str = "mean",
        decoupled: bool = False,
        hardness: float = 0.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.symmetric = symmetric
        self.batch_negatives = batch_negatives
        self.group = group
        self.backend = backend
        self.precision = precision
        self.reduction = reduction
        self.decoupled = decoupled
        self.hardness = hardness

    def forward(self, a: Tensor, b: Tensor, queue: Tensor | None = None) -> Tensor:
        return info_nce(
            a,
            b,
            self.temperature,
            symmetric=self.symmetric,
            queue=queue,
            batch_negatives=self.batch_negatives,
            group=self.group,
            backend=self.backend,
            precision=self.precision,
            reduction=self.reduction,
            decoupled=self.decoupled,
            hardness=self.hardness,
        )

    def extra_repr(self) -> str:
        temperature = "learned" if isinstance(self.temperature, nn.Parameter) else self.temperature
        return f"temperature={temperature}, symmetric={self.symmetric}, backend={self.backend!r}"
