"""How good predictions are: top-1, top-5, each class's accuracy, and which class was taken for which."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOP = 5
NOTHING = -1
"""In a ranking: no further class was predicted."""


@dataclass(frozen=True)
class Scores:
    """Accuracies are fractions."""

    top1: float
    top5: float
    """1.0 for up to five classes, where each ranking holds them all."""
    per_class: list[float | None]
    """Of each class's images, the fraction predicted right; None without any."""
    confusion: list[list[int]]
    """Images of class (row) that were taken for class (column)."""

    def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """The same with the classes' names."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "per_class": dict(zip(classes, self.per_class, strict=True)),
            "classes": list(classes),
            "confusion": self.confusion,
        }


def score(ranking: Tensor, labels: Tensor, classes: int) -> Scores:
    """ranking: (N, up to 5) int64, each image's most likely classes, likeliest first, NOTHING where there are no more;
    labels: (N,) int64 from 0 to classes - 1."""
    right = ranking == labels[:, None]
    confusion = torch.bincount(labels * classes + ranking[:, 0], minlength=classes**2).view(classes, classes)
    images = confusion.sum(1)
    return Scores(
        top1=right[:, 0].double().mean().item(),
        top5=right.any(1).double().mean().item(),
        per_class=[
            hit / total if total else None
            for hit, total in zip(confusion.diagonal().tolist(), images.tolist(), strict=True)
        ],
        confusion=confusion.tolist(),
    )


def rank_classes(logits: Tensor) -> Tensor:
    """(N, C) scores of each class to (N, up to 5) classes, likeliest first."""
    return logits.topk(min(TOP, logits.shape[1]), dim=1).indices
