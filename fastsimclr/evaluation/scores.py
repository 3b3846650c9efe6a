"""Scores of predictions: top-1, top-5, accuracy per class, and the confusion matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOP = 5
NOTHING = -1
"""Fills a ranking where no further class was predicted."""


@dataclass(frozen=True)
class Scores:
    """Scores of a set of predictions. Accuracies are fractions."""

    top1: float
    top5: float
    """1.0 for up to five classes, because each ranking holds all of them."""
    per_class: list[float | None]
    """Accuracy of each class; None for a class without images."""
    confusion: list[list[int]]
    """Number of images of class (row) predicted as class (column)."""

    def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return the scores with the names of the classes, for a JSON file."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "per_class": dict(zip(classes, self.per_class, strict=True)),
            "classes": list(classes),
            "confusion": self.confusion,
        }


def score(ranking: Tensor, labels: Tensor, classes: int) -> Scores:
    """Score the predictions of N images.

    ranking: (N, up to 5) int64, each image's most likely classes, most likely first, padded with NOTHING.
    labels: (N,) int64, from 0 to classes - 1.
    """
    correct = ranking == labels[:, None]
    confusion = torch.bincount(labels * classes + ranking[:, 0], minlength=classes**2).view(classes, classes)
    images = confusion.sum(1)
    return Scores(
        top1=correct[:, 0].double().mean().item(),
        top5=correct.any(1).double().mean().item(),
        per_class=[
            correct_images / total if total else None
            for correct_images, total in zip(confusion.diagonal().tolist(), images.tolist(), strict=True)
        ],
        confusion=confusion.tolist(),
    )


def rank_classes(logits: Tensor) -> Tensor:
    """Return the (N, up to 5) most likely classes for logits (N, C), most likely first."""
    return logits.topk(min(TOP, logits.shape[1]), dim=1).indices
