"""Tables of an evaluation: settings, accuracy per class, and the confusion matrix."""

from typing import Any

import numpy as np

from fastsimclr.reporting.numbers import number, percent
from fastsimclr.reporting.run_record import Evaluation

MAX_CLASSES = 30  # of a confusion matrix and a full list
EXTREMES = 10
MAX_PAIRS = 20


def settings(evaluation: Evaluation) -> dict[str, str]:
    """The formatted settings of an evaluation, without those that are off."""
    given = {name: value for name, value in evaluation.settings.items() if value is not False and value != {}}
    return {name.replace("_", " "): _formatted(value) for name, value in given.items()}


def _formatted(value: Any) -> str:
    """A setting in a few words: long lists, such as the losses of all epochs, by their first and last item."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_formatted(each)}" for name, each in value.items())
    if isinstance(value, list):
        items = [_formatted(each) for each in value]
        return f"{items[0]} → {items[-1]} ({len(items)} values)" if len(items) > 4 else ", ".join(items)
    if isinstance(value, float):
        return number(value)
    return "yes" if value is True else "none" if value is None else str(value)


def per_class(evaluation: Evaluation) -> list[tuple[str, float | None]]:
    """Accuracy per class, best first; with many classes, the best and the worst, and a row between them."""
    known = [(name, value) for name, value in evaluation.per_class.items() if value is not None]
    known.sort(key=lambda pair: -pair[1])
    if len(known) <= MAX_CLASSES:
        return [*known]
    return [*known[:EXTREMES], (f"… {len(known) - 2 * EXTREMES:,} more", None), *known[-EXTREMES:]]


def matrix(evaluation: Evaluation) -> list[list[tuple[int, float]]]:
    """Confusion matrix: (images, fraction of the row) of class (row) predicted as class (column).

    Empty with many classes, or if not recorded.
    """
    counts = evaluation.confusion
    if not counts.any() or len(counts) > MAX_CLASSES:
        return []
    return [[(int(n), float(n / max(row.sum(), 1))) for n in row] for row in counts]


def confusions(evaluation: Evaluation) -> list[list[str]]:
    """The most frequent confusions of many classes: class, predicted class, images, share of the class."""
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
