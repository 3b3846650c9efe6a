"""kNN accuracy against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastsimclr.evaluation.knn import TEMPERATURE, knn_accuracy, knn_ranking
from fastsimclr.evaluation.scores import NOTHING


def features(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` points of five overlapping clusters in eight dimensions, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    centers = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    return centers[labels] + 0.9 * torch.randn(count, 8, generator=generator), labels


def votes(cosine_distance: np.ndarray) -> np.ndarray:
    return np.exp(-cosine_distance / TEMPERATURE)


@pytest.mark.parametrize("k", [1, 20, 200])
def test_accuracy_matches_scikit_learn(k: int) -> None:
    (bank, bank_labels), (queries, query_labels) = (
        features(1500, 1),
        features(1100, 2),
    )  # more than one block of queries
    theirs = KNeighborsClassifier(k, metric="cosine", weights=votes, algorithm="brute").fit(bank, bank_labels)
    expected = theirs.score(queries, query_labels)
    assert 0.3 < expected < 0.99
    assert knn_accuracy(bank, bank_labels, queries, query_labels, k) == pytest.approx(expected, abs=1.5 / 1100)


def test_leave_one_out_excludes_the_image_itself() -> None:
    bank, labels = features(300, 3)
    correct = 0
    for i in range(300):
        others = torch.arange(300) != i
        theirs = KNeighborsClassifier(10, metric="cosine", weights=votes, algorithm="brute")
        correct += int(theirs.fit(bank[others], labels[others]).predict(bank[i : i + 1])[0] == labels[i])
    assert knn_accuracy(bank, labels, bank, labels, 10, leave_one_out=True) == pytest.approx(
        correct / 300, abs=1.5 / 300
    )
    assert knn_accuracy(bank, labels, bank, labels, 1) == 1.0  # without leave_one_out each image is its own neighbor


def test_k_larger_than_the_bank() -> None:
    bank, labels = features(12, 4)
    assert 0 <= knn_accuracy(bank, labels, bank, labels, 200, leave_one_out=True) <= 1


def test_leave_out_of_a_part_of_the_queries() -> None:
    """Each rank ranks its part of the queries."""
    bank, labels = features(50, 5)
    whole = knn_ranking(bank, labels, bank, 7, leave_out=0)
    parts = [knn_ranking(bank, labels, bank[first : first + 20], 7, leave_out=first) for first in (0, 20, 40)]
    assert torch.equal(torch.cat(parts), whole)


def test_ranking_contains_only_classes_with_votes() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0]])
    labels = torch.tensor([2, 0, 0, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_ranking(bank, labels, query, 3, temperature=None).tolist() == [[0, 2, NOTHING]]
    assert knn_ranking(bank, labels, query, 2, temperature=None).tolist() == [
        [0, 2, NOTHING]
    ]  # a tie goes to the lower class
    assert knn_ranking(bank, labels, query, 2, temperature=0.001).tolist() == [[2, 0, NOTHING]]
