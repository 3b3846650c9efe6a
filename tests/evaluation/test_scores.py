"""Top-1, top-5 and per-class accuracy and the confusion matrix, against scikit-learn and by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score

from fastsimclr.evaluation.scores import NOTHING, rank_classes, score


def test_scores_match_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(12, (300,), generator=generator)
    logits = torch.randn(300, 12, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, 12)
    scores = score(rank_classes(logits), labels, 12)
    predicted = logits.argmax(1).numpy()
    assert scores.top1 == pytest.approx(accuracy_score(labels, predicted))
    assert scores.top5 == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(12)))
    confusion = confusion_matrix(labels, predicted, labels=range(12))
    assert scores.confusion == confusion.tolist()
    assert scores.per_class == pytest.approx((confusion.diagonal() / confusion.sum(1)).tolist())
    assert 0.2 < scores.top1 < scores.top5 < 1


def test_class_without_images_has_no_accuracy() -> None:
    scores = score(torch.tensor([[0, 1, NOTHING], [2, 0, 1]]), torch.tensor([0, 1]), 3)
    assert scores.per_class == [1.0, 0.0, None]
    assert (scores.top1, scores.top5) == (0.5, 1.0)
    assert np.array_equal(scores.confusion, [[1, 0, 0], [0, 0, 1], [0, 0, 0]])
    assert scores.to_json("abc")["per_class"] == {"a": 1.0, "b": 0.0, "c": None}
