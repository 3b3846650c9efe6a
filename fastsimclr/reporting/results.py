"""Evaluations as tables: accuracies, those of the classes, and which class is taken for which."""

from collections.abc import Iterable, Sequence

import numpy as np

from fastsimclr.reporting.markup import Child, Html, element, scroll, table
from fastsimclr.reporting.numbers import count, percent
from fastsimclr.reporting.run_record import Evaluation

MOST_CLASSES = 30  # that are shown one by one, and against each other
EXTREMES = 10
MOST_PAIRS = 20


def accuracies(rows: Sequence[tuple[Child, Evaluation]], head: Child) -> Html:
    """Top-1 and top-5 of each evaluation. rows: whose it is, if there are several, and the evaluation."""
    return table(
        [*([head] if head else []), "evaluation", "top-1", "top-5", "trained on", "measured on", "settings", "encoder"],
        [
            [
                *([run] if head else []),
                evaluation.name,
                element("b", percent(evaluation.top1)),
                percent(evaluation.top5),
                evaluation.train_images,
                evaluation.val_images,
                _settings(evaluation),
                evaluation.origin or "–",
            ]
            for run, evaluation in rows
        ],
        label="Accuracies",
        class_="figures",
    )


def details(evaluation: Evaluation, title: str, opened: bool) -> Html:
    """One evaluation's classes, folded."""
    return element(
        "details",
        element("summary", title, " ", element("span", percent(evaluation.top1), ", ",
                count(len(evaluation.classes), "class", "classes"), class_="soft")),
        element("div", per_class(evaluation), confusion(evaluation), class_="pair"),
        open=opened,
    )  # fmt: skip


def per_class(evaluation: Evaluation) -> Html:
    """Each class's accuracy as a bar, best first; of many classes the best and the worst."""
    known = [(name, value) for name, value in evaluation.per_class.items() if value is not None]
    known.sort(key=lambda pair: -pair[1])
    without = len(evaluation.per_class) - len(known)
    title = "Accuracy of each class"
    bars: list[Iterable[Child]] = [_bar(name, value) for name, value in known]
    if len(known) > MOST_CLASSES:
        between = len(known) - 2 * EXTREMES
        gap = element("tr", element("th", f"… {between:,} more", scope="row"), class_="gap")
        title, bars = f"Accuracy of the {EXTREMES} best and the {EXTREMES} worst classes", bars[:EXTREMES]
        bars += [gap, *(_bar(name, value) for name, value in known[-EXTREMES:])]
    missing = f"Without images to measure on: {count(without, 'class', 'classes')}." if without else None
    shown = table(["class", "", "accuracy"], bars, label=title, class_="bars")
    return element("section", element("h4", title), shown, element("p", missing, class_="note") if missing else None)


def confusion(evaluation: Evaluation) -> Html | None:
    """Which class was taken for which: the whole matrix, or of many classes the most frequent mistakes."""
    if not evaluation.confusion.any():
        return None
    return _matrix(evaluation) if len(evaluation.classes) <= MOST_CLASSES else _pairs(evaluation)


def _settings(evaluation: Evaluation) -> str:
    parts = [f"{name.replace('_', ' ')} {value}" for name, value in evaluation.settings.items() if value is not False]
    return ", ".join(parts) or "–"


def _bar(name: str, accuracy: float) -> list[Child]:
    return [
        element("span", name, class_="name", title=name),
        element("div", element("i", style=f"width:{100 * accuracy:.1f}%"), class_="bar", aria_hidden="true"),
        percent(accuracy),
    ]


def _matrix(evaluation: Evaluation) -> Html:
    classes, counts = evaluation.classes, evaluation.confusion
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    head = element(
        "tr",
        element("td", class_="corner"),
        [element("th", element("span", name, title=name), scope="col") for name in classes],
    )
    rows = []
    for row, name in enumerate(classes):
        cells = []
        for column, other in enumerate(classes):
            many, share = int(counts[row, column]), float(shares[row, column])
            if many == 0:
                cells.append(element("td"))
                continue
            # A mistake is rare: by its square root its shade is seen.
            shade = share if row == column else share**0.5
            kind = ("hit" if row == column else "miss") + (" strong" if shade > 0.55 else "")
            words = f"{name} taken for {other}: {many:,} ({percent(share)})"
            cells.append(element("td", f"{many:,}", class_=kind, style=f"--shade:{shade:.3f}", title=words))
        rows.append(element("tr", element("th", element("span", name, title=name), scope="row"), cells))
    grid = element("table", element("thead", head), element("tbody", rows), class_="confusion")
    note = (
        "A row is a class, its columns what its images were taken for. Mistakes are shaded by the root of their share."
    )
    return element(
        "section",
        element("h4", "What was taken for what"),
        scroll(grid, "Confusion matrix"),
        element("p", note, class_="note"),
    )


def _pairs(evaluation: Evaluation) -> Html:
    classes, counts = evaluation.classes, evaluation.confusion
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    most = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = [(int(place) // len(classes), int(place) % len(classes)) for place in most]
    rows = [
        [classes[row], classes[column], f"{wrong[row, column]:,}", percent(wrong[row, column] / counts[row].sum())]
        for row, column in pairs
        if wrong[row, column]
    ]
    title = f"The {len(rows)} most frequent mistakes"
    return element(
        "section",
        element("h4", title),
        table(["class", "taken for", "images", "of the class"], rows, label=title, class_="figures"),
    )
