"""kNN accuracy of representations: what an encoder is worth, with nothing trained on top."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsimclr.data import Source, open_views
from fastsimclr.distributed import World, gather_objects
from fastsimclr.views import Views

TEMPERATURE = 0.07  # Wu et al., arXiv 1805.01978
_BLOCK = 1024  # queries at a time: nothing of size queries x bank is ever held


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, *, leave_one_out: bool = False
) -> float:
    """Fraction of `queries` whose k most similar rows of `bank`, weighted by exp(cosine / 0.07), vote for their label.

    bank: (N, D); queries: (Q, D); labels: int64. leave_one_out: queries are the bank, and none votes for itself.
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    k = min(k, len(bank) - leave_one_out)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    correct = 0
    for first in range(0, len(queries), _BLOCK):
        block = queries[first : first + _BLOCK]
        similarity = block @ bank.T
        if leave_one_out:
            similarity[:, first : first + len(block)].fill_diagonal_(-torch.inf)
        weight, neighbour = similarity.topk(k, dim=1)
        votes = torch.zeros(len(block), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[neighbour], ((weight - 1) / TEMPERATURE).exp())
        correct += int((votes.argmax(1) == query_labels[first : first + len(block)]).sum())
    return correct / len(queries)


def embed(
    encoder: nn.Module, source: Source, views: Views, batch_size: int, world: World, *, backend: str, bf16: bool
) -> tuple[Tensor, Tensor]:
    """Representations (N, D) float32 and labels (N,) of every image of `source`, on the CPU of every rank.

    Each rank embeds its part of the images, seen as `Views.plain` says, by the encoder in eval mode.
    """
    loader = open_views(
        source,
        views.plain(),
        min(batch_size, len(source)),
        backend=backend,
        device=world.device,
        rank=world.rank,
        world_size=world.world_size,
        shuffle=False,
        min_local_batch=0,
    )
    dtype = next(encoder.parameters()).dtype
    was_training = encoder.training
    encoder.eval()
    features, labels = [], []
    with torch.inference_mode(), torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
        for batch in loader:
            features.append(encoder(batch.views[0].to(dtype)).float().cpu())
            labels.append(batch.label.cpu())
    encoder.train(was_training)
    loader.close()
    part = (torch.cat(features), torch.cat(labels)) if features else None
    parts = [p for p in gather_objects(part, world) if p is not None]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def measure(
    encoder: nn.Module,
    train: Source,
    val: Source | None,
    views: Views,
    batch_size: int,
    world: World,
    k: int,
    *,
    backend: str,
    bf16: bool,
) -> float:
    """kNN accuracy of `val` by the labels of `train`; without `val`, of `train` by all of its other images."""
    bank, bank_labels = embed(encoder, train, views, batch_size, world, backend=backend, bf16=bf16)
    queries, query_labels = bank, bank_labels
    if val is not None:
        queries, query_labels = embed(encoder, val, views, batch_size, world, backend=backend, bf16=bf16)
    device = world.device
    bank, bank_labels, queries, query_labels = (t.to(device) for t in (bank, bank_labels, queries, query_labels))
    return knn_accuracy(bank, bank_labels, queries, query_labels, k, leave_one_out=val is None)
