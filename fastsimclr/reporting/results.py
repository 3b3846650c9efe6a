"""Evaluations as tables: accuracies, those of the classes, and which class is taken for which."""

import numpy as np

from fastsimclr.reporting.numbers import percent
from fastsimclr.reporting.run_record import Evaluation

MAX_CLASSES = 30  # that are shown one by one, and against each other
EXTREMES = 10
MAX_PAIRS = 20


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


def per_class(evaluation: Evaluation) -> list[tuple[str, float | None]]:
    """Each class's accuracy, best first; of many the best and the worst, with a row without accuracy between them."""
    known = [(name, value) for name, value in evaluation.per_class.items() if value is not None]
    known.sort(key=lambda pair: -pair[1])
    if len(known) <= MAX_CLASSES:
        return [*known]
    return [*known[:EXTREMES], (f"… {len(known) - 2 * EXTREMES:,} more", None), *known[-EXTREMES:]]


def matrix(evaluation: Evaluation) -> list[list[tuple[int, float]]]:
    """How many images, and what share of their class (row), were taken for which (column); empty for many classes,
    and where that was not kept."""
    counts = evaluation.confusion
    if not counts.any() or len(counts) > MAX_CLASSES:
        return []
    return [[(int(n), float(n / max(row.sum(), 1))) for n in row] for row in counts]


def mistakes(evaluation: Evaluation) -> list[list[str]]:
    """Of many classes the most frequent mistakes: class, taken for, images, share of the class."""
    counts, classes = evaluation.confusion, evaluation.classes
    if len(counts) <= MAX_CLASSES:
        return []
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    most = [divmod(int(place), len(classes)) for place in np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]]
    return [
        [classes[row], classes[column], f"{wrong[row, column]:,}", percent(wrong[row, column] / counts[row].sum())]
        for row, column in most
        if wrong[row, column]
    ]
