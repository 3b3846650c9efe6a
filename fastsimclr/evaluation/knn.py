"""kNN accuracy of representations: what an encoder is worth, with nothing trained on top."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsimclr.data import Source
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.evaluation.features import embed
from fastsimclr.evaluation.scores import NOTHING, TOP

TEMPERATURE = 0.07  # Wu et al., arXiv 1805.01978
_BLOCK = 1024  # queries at a time: nothing of size queries x bank is ever held


def knn_ranking(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int,
    *,
    temperature: float | None = TEMPERATURE,
    leave_out: int | None = None,
) -> Tensor:
    """The classes that each query's k most similar rows of `bank` vote for: (Q, up to 5) int64, most votes first,
    NOTHING where no further class has one. Of equal votes the lower class comes first.

    bank: (N, D); bank_labels: (N,) int64; queries: (Q, D). A vote is worth exp(cosine / temperature), or 1 if that is
    None. leave_out: queries are the bank's rows from this one on, and none votes for itself; k is then at most N - 1.
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    k = min(k, len(bank) - (leave_out is not None))
    classes = int(bank_labels.max()) + 1
    rankings = [torch.empty(0, min(TOP, classes), dtype=torch.int64, device=bank.device)]
    for first in range(0, len(queries), _BLOCK):
        similarity = queries[first : first + _BLOCK] @ bank.T
        if leave_out is not None:
            similarity[:, leave_out + first :].fill_diagonal_(-torch.inf)
        nearest, neighbor = similarity.topk(k, dim=1)
        vote = torch.ones_like(nearest) if temperature is None else ((nearest - 1) / temperature).exp()
        votes = torch.zeros(len(nearest), classes, device=bank.device, dtype=torch.float64)
        votes.scatter_add_(1, bank_labels[neighbor], vote.double())
        most, ranking = votes.sort(dim=1, descending=True, stable=True)
        rankings.append(ranking.where(most > 0, NOTHING)[:, :TOP])
    return torch.cat(rankings)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, *, leave_one_out: bool = False
) -> float:
    """Fraction of `queries` whose k most similar rows of `bank`, weighted by exp(cosine / 0.07), vote for their label.

    bank: (N, D); queries: (Q, D); labels: int64. leave_one_out: queries are the bank, and none votes for itself.
    """
    ranking = knn_ranking(bank, bank_labels, queries, k, leave_out=0 if leave_one_out else None)
    return (ranking[:, 0] == query_labels).double().mean().item()


def measure(
    encoder: nn.Module,
    train: Source,
    val: Source | None,
    augmentation: Augmentation,
    config: LoaderConfig,
    k: int,
    *,
    autocast: torch.dtype | None,
) -> float:
    """kNN accuracy of `val` by the labels of `train`; without `val`, of `train` by all of its other images."""
    bank, bank_labels = embed(encoder, train, augmentation, config, autocast=autocast, title="kNN, training images")
    queries, query_labels = bank, bank_labels
    if val is not None:
        queries, query_labels = embed(
            encoder, val, augmentation, config, autocast=autocast, title="kNN, validation images"
        )
    device = config.world.device
    bank, bank_labels, queries, query_labels = (t.to(device) for t in (bank, bank_labels, queries, query_labels))
    return knn_accuracy(bank, bank_labels, queries, query_labels, k, leave_one_out=val is None)
