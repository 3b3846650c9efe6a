"""Evaluations as tables: accuracies, those of the classes, and which class is taken for which."""

from dataclasses import dataclass

import numpy as np

from fastsimclr.reporting.numbers import percent
from fastsimclr.reporting.run_record import Evaluation

MOST_CLASSES = 30  # that are shown one by one, and against each other
EXTREMES = 10
MOST_PAIRS = 20


@dataclass(frozen=True)
class Cell:
    """A cell of a confusion matrix that is not empty."""

    count: int
    share: float
    hit: bool

    @property
    def shade(self) -> float:
        """From 0 to 1. A mistake is rare: by its square root its shade is seen."""
        return self.share if self.hit else self.share**0.5


@dataclass(frozen=True)
class Classes:
    """An evaluation's classes one by one; of many the best and the worst."""

    best: list[tuple[str, float]]
    worst: list[tuple[str, float]]
    between: int
    """Classes that are not shown."""
    unmeasured: int
    """Classes without images to measure on."""


def accuracies(evaluation: Evaluation) -> list[str]:
    """A row of the table of evaluations."""
    given = {name.replace("_", " "): value for name, value in evaluation.settings.items() if value is not False}
    return [
        evaluation.name,
        percent(evaluation.top1),
        percent(evaluation.top5),
        evaluation.train_images,
        evaluation.val_images,
        ", ".join(f"{name} {value}" for name, value in given.items()) or "–",
        evaluation.origin or "–",
    ]


def per_class(evaluation: Evaluation) -> Classes:
    """Each class's accuracy, best first."""
    known = [(name, value) for name, value in evaluation.per_class.items() if value is not None]
    known.sort(key=lambda pair: -pair[1])
    unmeasured = len(evaluation.per_class) - len(known)
    if len(known) <= MOST_CLASSES:
        return Classes(known, [], 0, unmeasured)
    return Classes(known[:EXTREMES], known[-EXTREMES:], len(known) - 2 * EXTREMES, unmeasured)


def matrix(evaluation: Evaluation) -> list[list[Cell | None]]:
    """Which class (row) was taken for which (column); empty for many classes, and where that was not kept."""
    counts = evaluation.confusion
    if not counts.any() or len(counts) > MOST_CLASSES:
        return []
    return [
        [Cell(int(n), float(n / row.sum()), place == other) if n else None for other, n in enumerate(row)]
        for place, row in enumerate(counts)
    ]


def mistakes(evaluation: Evaluation) -> list[list[str]]:
    """Of many classes the most frequent mistakes: class, taken for, images, share of the class."""
    counts, classes = evaluation.confusion, evaluation.classes
    if len(counts) <= MOST_CLASSES:
        return []
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    most = [divmod(int(place), len(classes)) for place in np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]]
    return [
        [classes[row], classes[column], f"{wrong[row, column]:,}", percent(wrong[row, column] / counts[row].sum())]
        for row, column in most
        if wrong[row, column]
    ]
