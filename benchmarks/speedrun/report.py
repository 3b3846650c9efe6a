"""The table and the picture of the speedrun's records."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.report import table

Record = dict[str, Any]
"""What a run has written: see `benchmarks.speedrun.__main__.train_and_evaluate`."""

ACCURACIES = {"knn20": "kNN, k=20", "knn200": "kNN, k=200", "linear": "linear"}
HEAD = ("contender", "seeds", *ACCURACIES.values(), "steps", "images seen", "seconds", "loss")
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")  # Okabe-Ito
CUT, OVERRAN = "†", "‡"
NOTES = {
    CUT: "A run was ended by the budget before the end of its learning rate schedule.",
    OVERRAN: "A run took over 3 % longer than the budget.",
}


def title(record: Record) -> str:
    amount = f"{record['budget_s']:g} s" if record["budget_s"] else f"{record['planned_steps']:,} steps"
    return f"{amount} on {record['train_images']:,} images"


def group(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Return the records by title and contender: short budgets first, then the most accurate contender."""
    groups: dict[str, dict[str, list[Record]]] = {}
    for record in sorted(records, key=lambda each: (each["budget_s"] or 0, each["planned_steps"], each["seed"])):
        groups.setdefault(title(record), {}).setdefault(record["name"], []).append(record)
    return {
        name: dict(sorted(contenders.items(), key=lambda item: -mean(item[1], "knn20")))
        for name, contenders in groups.items()
    }


def accuracies(seeds: Sequence[Record], name: str) -> list[float]:
    """Return an accuracy of each seed, in percent."""
    return [100 * record["accuracy"][name] for record in seeds]


def mean(seeds: Sequence[Record], name: str) -> float:
    return statistics.mean(accuracies(seeds, name))


def report(records: Sequence[Record]) -> str:
    """Return the tables in markdown, one for each budget or number of steps."""
    lines = ["# Speedrun", "", "Accuracy on the test images in %: mean over the seeds (lowest to highest).", ""]
    for name, contenders in group(records).items():
        rows = [row(contender, seeds) for contender, seeds in contenders.items()]
        lines += [f"## {name}", "", *table(HEAD, rows), ""]
        lines += [f"{mark} {note}\n" for mark, note in NOTES.items() if any(mark in each[0] for each in rows)]
        runs = [record for seeds in contenders.values() for record in seeds]
        lines += [f"{line}  " for line in dict.fromkeys(map(describe_machine, runs))] + [""]
    return "\n".join(lines)


def row(contender: str, seeds: Sequence[Record]) -> list[str]:
    marks = CUT * any(each["cut"] for each in seeds) + OVERRAN * any(each["overran"] for each in seeds)

    def average(name: str) -> str:
        return f"{statistics.mean(each[name] for each in seeds):,.0f}"

    return [
        f"{contender} {marks}".strip(),
        str(len(seeds)),
        *(cell(accuracies(seeds, name)) for name in ACCURACIES),
        *map(average, ("steps", "images_seen", "seconds")),
        f"{statistics.mean(each['curve']['loss'][-1] for each in seeds):.3f}",
    ]


def cell(values: Sequence[float]) -> str:
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def describe_machine(record: Record) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return f"{machine['device']}, {machine['cores']} cores; {versions}; commit {record['commit']}"


def draw(records: Sequence[Record], file: Path) -> None:
    """Draw a row for each budget or number of steps: the accuracies, and the loss curves of the first seed."""
    groups = group(records)
    names = sorted({record["name"] for record in records})
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    figure = Figure(figsize=(13, 3.4 * len(groups)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for row_of_axes, (name, contenders) in zip(
        figure.subplots(len(groups), 3, squeeze=False), groups.items(), strict=True
    ):
        knn, linear, loss = row_of_axes
        draw_bars(knn, contenders, "knn20", colors)
        draw_bars(linear, contenders, "linear", colors)
        linear.set_yticklabels([])
        for contender, seeds in contenders.items():
            loss.plot(seeds[0]["curve"]["seconds"], seeds[0]["curve"]["loss"], color=colors[contender])
        knn.set_title(f"{name}\n{ACCURACIES['knn20']}", loc="left")
        linear.set_title(f"\n{ACCURACIES['linear']}", loc="left")
        loss.set_title("\nloss", loc="left")
        loss.set(xlabel="seconds")
        for axes in row_of_axes:
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def draw_bars(axes: Axes, contenders: dict[str, list[Record]], accuracy: str, colors: dict[str, str]) -> None:
    """Draw a bar for the mean of each contender, the most accurate at the top, with a dot for each seed."""
    for y, (name, seeds) in enumerate(contenders.items()):
        axes.barh(y, mean(seeds, accuracy), color=colors[name], height=0.6)
        axes.plot(accuracies(seeds, accuracy), [y] * len(seeds), "o", color="black", markersize=3)
        axes.text(0.5, y, f"{mean(seeds, accuracy):.1f}", color="white", va="center", weight="bold")
    axes.set_yticks(range(len(contenders)), list(contenders))
    axes.invert_yaxis()
    axes.set(xlabel="% of the test images; dots: seeds")
