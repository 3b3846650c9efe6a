"""k-nearest-neighbor classification of representations that are shared out over the ranks.

Each rank keeps its shard of the bank and of the queries. Blocks of queries visit all ranks: each finds the nearest of
its own shard, and the rank that asked merges what they found. So the result does not depend on the number of ranks:

    The product of two float16 numbers is a multiple of 2^-48, and sums of such products below 32 are exact in float64,
    whatever their order. Neighbors of equal similarity (rounded to 2^-22) are ordered by their index in the source.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsimclr.data import Source
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.data.subsets import class_indices, sample
from fastsimclr.distributed import SINGLE_PROCESS, World, all_gather, gather_objects
from fastsimclr.evaluation.features import Shard, Sync, embed_shard, exchange_errors
from fastsimclr.evaluation.scores import NOTHING, TOP
from fastsimclr.progress_bar import progress_bar

TEMPERATURE = 0.07  # Wu et al., arXiv 1805.01978
# Sizes of one block of work, large enough for a fast matrix product: about 50 MB in all, and on a CPU about a second.
_QUERIES, _KEYS, _FEATURES = 512, 1 << 21, 1 << 21
# A key holds a similarity and an image, so that keys are sorted by both: round(similarity * 2^22) - image * 2^-29.
_SIMILARITY, _IMAGE = 2.0**22, 2.0**-29
_CPU_BATCH, _GPU_BATCH = 32, 256  # images per rank: a signal is answered after each batch


def knn_ranking(
    bank: Shard,
    labels: Tensor,
    queries: Shard,
    k: int,
    *,
    temperature: float | None = TEMPERATURE,
    leave_one_out: bool = False,
    world: World = SINGLE_PROCESS,
    sync: Sync | None = None,
) -> Tensor:
    """Rank the classes of each of this rank's queries by the votes of its k nearest neighbors, on whichever rank.

    bank: n_r of N images; labels: (N,) int64 of all images of its source; queries: Q_r images.
    temperature: a vote has weight exp(cosine / temperature); None: weight 1.
    leave_one_out: the queries are from the source of the bank, and no image votes for itself.
    sync: called between blocks; default: only exchange errors.
    Returns (Q_r, up to 5) int64 classes, most votes first, NOTHING where no further class has votes. Ties go to the
    lower class.
    """
    sync = sync or exchange_errors(world)
    k = min(k, len(labels) - leave_one_out)
    classes = int(labels.max()) + 1
    block = max(1, _QUERIES // world.world_size)
    numbers = gather_objects(len(queries), world)
    rankings = [torch.empty(0, min(TOP, classes), dtype=torch.int64, device=labels.device)]
    bar = progress_bar(sum(numbers), "kNN, neighbors", "image", visible=world.is_rank_zero)
    for first in range(0, max(numbers), block):
        sync(None)
        own = Shard(queries.images[first : first + block], queries.features[first : first + block])
        asked = _of_all_ranks(own, block, world)
        keys = _nearest(bank, asked, k, leave_one_out)  # (world_size * block, k)
        keys = _return_to_askers(keys, world)[: len(own)]  # (Q, world_size * k)
        rankings.append(_vote(keys.topk(k, dim=1).values, labels, classes, temperature))
        bar.update(sum(min(block, max(0, number - first)) for number in numbers))
    bar.close()
    return torch.cat(rankings)


def _of_all_ranks(own: Shard, block: int, world: World) -> Shard:
    """Return the queries of all ranks, (world_size * block), in rank order. Missing ones are zero, of image -1."""
    if world.world_size == 1:
        return own
    images = own.images.new_full((block,), -1)
    features = own.features.new_zeros(block, own.features.shape[1])
    images[: len(own)], features[: len(own)] = own.images, own.features
    gathered = images.repeat(world.world_size), features.repeat(world.world_size, 1)
    all_gather(gathered[0], images)
    all_gather(gathered[1], features)
    return Shard(*gathered)


def _nearest(bank: Shard, queries: Shard, k: int, leave_one_out: bool) -> Tensor:
    """Return the keys (Q, k) of the nearest neighbors in the bank, nearest first; -inf if the bank has fewer."""
    best = queries.features.new_full((len(queries), k), -torch.inf, dtype=torch.float64)
    scaled = queries.features.double() * _SIMILARITY
    rows = max(1, min(_KEYS // len(queries), _FEATURES // bank.features.shape[1]))
    for images, features in zip(bank.images.split(rows), bank.features.split(rows), strict=True):
        keys = (scaled @ features.double().T).round_().sub_(images * _IMAGE)
        if leave_one_out:
            keys.masked_fill_(queries.images[:, None] == images, -torch.inf)
        best = torch.cat([best, keys.topk(min(k, len(images)), dim=1).values], dim=1).topk(k, dim=1).values
    return best


def _return_to_askers(keys: Tensor, world: World) -> Tensor:
    """Return what all ranks found for this rank's queries: (world_size * block, k) to (block, world_size * k)."""
    if world.world_size == 1:
        return keys
    returned = torch.empty_like(keys)
    dist.all_to_all_single(returned, keys)
    return returned.view(world.world_size, -1, keys.shape[1]).transpose(0, 1).flatten(1)


def _vote(keys: Tensor, labels: Tensor, classes: int, temperature: float | None) -> Tensor:
    """Rank the classes by the votes of the neighbors with these keys (Q, k)."""
    is_found = keys.isfinite()
    keys = keys.where(is_found, 0.0)
    similarity = keys.ceil()
    neighbor_labels = labels[((similarity - keys) / _IMAGE).long()]
    vote = is_found.double()
    if temperature is not None:
        vote *= ((similarity / _SIMILARITY - 1) / temperature).exp()
    votes = vote.new_zeros(len(keys), classes)
    for column in range(keys.shape[1]):  # one at a time: a GPU adds in a random order
        votes.scatter_add_(1, neighbor_labels[:, column : column + 1], vote[:, column : column + 1])
    most, ranking = votes.sort(dim=1, descending=True, stable=True)
    return ranking.where(most > 0, NOTHING)[:, :TOP]


class Accuracy(NamedTuple):
    """Fractions of the images."""

    knn: float
    classifier: float | None = None


def measure(
    encoder: nn.Module,
    train: Source,
    val: Source | None,
    augmentation: Augmentation,
    config: LoaderConfig,
    k: int,
    *,
    images: int | None,
    autocast: torch.dtype | None,
    classify: Callable[[Tensor], Tensor] | None = None,
    sync: Sync | None = None,
) -> Accuracy:
    """Return the kNN accuracy of `val` with `train` as the bank, a fraction; without `val`, leave-one-out on `train`.

    classify: maps normalized representations (Q, D) to classes (Q,), whose accuracy on `val` is measured, too.
    images: largest number of images of each, chosen by config.seed; None: all.
    sync: called between batches and blocks; default: only exchange errors.
    """
    world = config.world
    local_batch = min(_CPU_BATCH if world.device.type == "cpu" else _GPU_BATCH, config.batch_size // world.world_size)
    config = replace(config, batch_size=max(1, local_batch) * world.world_size)

    def embed(source: Source, what: str) -> tuple[Shard, Tensor]:
        shard = embed_shard(
            encoder, source, augmentation, config, autocast=autocast, title=f"kNN, {what} images", sync=sync
        )
        return shard, torch.from_numpy(class_indices(source, train.classes)).to(world.device)

    bank, labels = embed(sample(train, images, config.seed), "training")
    queries, query_labels = (bank, labels) if val is None else embed(sample(val, images, config.seed), "validation")
    ranking = knn_ranking(bank, labels, queries, k, leave_one_out=val is None, world=world, sync=sync)
    predicted = [ranking[:, 0]]
    if classify is not None and val is not None:
        predicted.append(classify(queries.features))
    expected = query_labels[queries.images]
    correct = [int((classes == expected).sum()) for classes in predicted]
    counts = torch.tensor(gather_objects([*correct, len(expected)], world)).sum(0)
    return Accuracy(*(counts[:-1] / counts[-1]).tolist())
