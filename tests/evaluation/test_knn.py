"""kNN accuracy against scikit-learn, and on several ranks."""

from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from fastsimclr.data import open_source
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.errors import UserError
from fastsimclr.evaluation import knn
from fastsimclr.evaluation.features import Shard
from fastsimclr.evaluation.knn import TEMPERATURE, knn_ranking, measure
from fastsimclr.evaluation.scores import NOTHING


def features(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `count` points of five overlapping clusters in eight dimensions, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    centers = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    return centers[labels] + 0.9 * torch.randn(count, 8, generator=generator), labels


def whole(rows: Tensor) -> Shard:
    return Shard.of(torch.arange(len(rows)), rows)


def accuracy(bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, **options: Any) -> float:
    ranking = knn_ranking(whole(bank), labels, whole(queries), k, **options)
    return (ranking[:, 0] == query_labels).double().mean().item()


def votes(cosine_distance: np.ndarray) -> np.ndarray:
    return np.exp(-cosine_distance / TEMPERATURE)


@pytest.mark.parametrize("k", [1, 20, 200])
def test_accuracy_matches_scikit_learn(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_FEATURES", 8 * 400)  # 1500 rows of the bank: three blocks of 400 and one of 300
    # More than one block of queries.
    (bank, labels), (queries, query_labels) = features(1500, 1), features(1100, 2)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=votes, algorithm="brute").fit(bank, labels)
    expected = theirs.score(queries, query_labels)
    assert 0.3 < expected < 0.99
    assert accuracy(bank, labels, queries, query_labels, k) == pytest.approx(expected, abs=1.5 / 1100)


def test_leave_one_out_excludes_the_image_itself() -> None:
    bank, labels = features(300, 3)
    correct = 0
    for i in range(300):
        others = torch.arange(300) != i
        theirs = KNeighborsClassifier(10, metric="cosine", weights=votes, algorithm="brute")
        correct += int(theirs.fit(bank[others], labels[others]).predict(bank[i : i + 1])[0] == labels[i])
    found = accuracy(bank, labels, bank, labels, 10, leave_one_out=True)
    assert found == pytest.approx(correct / 300, abs=1.5 / 300)
    assert accuracy(bank, labels, bank, labels, 1) == 1.0  # without leave_one_out each image is its own neighbor


def test_k_larger_than_the_bank() -> None:
    bank, labels = features(12, 4)
    ranking = knn_ranking(whole(bank), labels, whole(bank), 200, leave_one_out=True, temperature=None)
    others = torch.bincount(labels, minlength=5) - nn.functional.one_hot(labels, 5)
    assert torch.equal(ranking[:, 0], others.argmax(1)), "all others vote"


def test_ranking_contains_only_classes_with_votes() -> None:
    bank = whole(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0]]))
    labels = torch.tensor([2, 0, 0, 1])
    query = whole(torch.tensor([[1.0, 0.0]]))
    assert knn_ranking(bank, labels, query, 3, temperature=None).tolist() == [[0, 2, NOTHING]]
    # A tie goes to the lower class.
    assert knn_ranking(bank, labels, query, 2, temperature=None).tolist() == [[0, 2, NOTHING]]
    assert knn_ranking(bank, labels, query, 2, temperature=0.001).tolist() == [[2, 0, NOTHING]]


def test_equal_neighbors_are_taken_in_the_order_of_their_images() -> None:
    labels = torch.arange(100) % 7
    query = whole(torch.ones(1, 3))
    bank = Shard.of(torch.arange(100).flip(0), torch.ones(100, 3))
    for k in (1, 4):
        assert knn_ranking(bank, labels, query, k, temperature=None)[0, :k].tolist() == [0, 1, 2, 3][:k]


def rank_everywhere(rank: int, world_size: int, cases: list[tuple[Any, ...]]) -> list[tuple[Tensor, Tensor, int]]:
    """Rank the queries of this rank; return their images, their ranking, and the largest tensor exchanged, in bytes."""
    largest = 0

    def spy(collective: Any) -> Any:
        def call(output: Tensor, *arguments: Any, **options: Any) -> Any:
            nonlocal largest
            largest = max(largest, output.nbytes)
            return collective(output, *arguments, **options)

        return call

    knn.all_gather = spy(knn.all_gather)  # type: ignore[attr-defined]
    knn.dist.all_to_all_single = spy(knn.dist.all_to_all_single)  # type: ignore[attr-defined]
    world, results = World(rank, world_size, torch.device("cpu")), []
    for bank, labels, queries, options in cases:
        mine = torch.arange(rank, len(bank), world_size)
        shard = Shard.of(mine, bank[mine])
        asked = torch.arange(rank, len(queries), world_size)
        own = shard if options.get("leave_one_out") else Shard.of(asked, queries[asked])
        results.append((own.images, knn_ranking(shard, labels, own, world=world, **options), largest))
    return results


@pytest.mark.slow
def test_ranking_is_the_same_on_any_number_of_ranks() -> None:
    """Bit for bit, with ties: half of the rows occur twice. A rank that has few images or none takes part."""
    bank, labels = features(1500, 1)
    bank = torch.cat([bank, bank[::2]])
    labels = torch.cat([labels, (labels[::2] + 1) % 5])
    cases = [
        (bank, labels, bank, {"k": 20, "leave_one_out": True}),
        (bank, labels, features(1100, 2)[0], {"k": 7, "temperature": None}),
        (bank[:5], labels[:5], bank[:2], {"k": 5}),
    ]
    found = run_ranks(3, rank_everywhere, 3, cases)
    for case, (data, case_labels, queries, options) in enumerate(cases):
        expected = knn_ranking(whole(data), case_labels, whole(queries), **options)
        images = torch.cat([of_rank[case][0] for of_rank in found])
        ranking = torch.cat([of_rank[case][1] for of_rank in found])
        assert torch.equal(ranking[images.argsort()], expected), case
        block_bytes = 512 * max(2 * 8, 8 * 20)  # the queries of a block in float16, or their 20 keys
        assert max(of_rank[case][2] for of_rank in found) <= block_bytes


class Pixels(nn.Module):
    """An encoder whose representations are the pixels."""

    out_features = 3 * 8 * 8

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * images.flatten(1)


class Raising(nn.Module):
    out_features = 4

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.weight = rank, nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.rank == 1:
            raise UserError("image 7: damaged")
        return self.weight * images.flatten(1)[:, :4]


def measure_on(rank: int, world_size: int, images: int | None) -> float:
    world = World(rank, world_size, torch.device("cpu")) if world_size > 1 else SINGLE_PROCESS
    config = LoaderConfig(batch_size=32 * world_size, world=world)
    augmentation = Augmentation(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    train, val = open_source("digits"), open_source("digits", split="val")
    if world_size > 1:
        with pytest.raises(UserError, match="image 7: damaged"):
            measure(Raising(rank), train, val, augmentation, config, 20, images=images, autocast=None)
    return measure(Pixels(), train, val, augmentation, config, 20, images=images, autocast=None).knn


@pytest.mark.slow
def test_measured_accuracy_is_the_same_on_any_number_of_ranks() -> None:
    """After an error of one rank, which is raised on all."""
    assert run_ranks(3, measure_on, 3, 500) == 3 * [measure_on(0, 1, 500)]


def test_fewer_images_are_less_accurate() -> None:
    accuracies = [measure_on(0, 1, images) for images in (20, 200, None)]
    assert accuracies == sorted(accuracies)
    assert accuracies[0] < accuracies[2] > 0.9
