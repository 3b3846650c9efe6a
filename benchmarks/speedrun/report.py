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
    """Draw the accuracies against the seconds of training, and the loss curves of the first seed."""
    groups = group(records)
    names = sorted({record["name"] for record in records})
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    figure = Figure(figsize=(13, 4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    knn, linear, loss = figure.subplots(1, 3)
    for axes, accuracy in ((knn, "knn20"), (linear, "linear")):
        for name in names:
            points = [contenders[name] for contenders in groups.values() if name in contenders]
            draw_accuracy(axes, points, accuracy, colors[name], name)
        axes.set(title=f"{ACCURACIES[accuracy]}: mean, lowest and highest", xlabel="seconds", ylabel="%")
    for name, seeds in list(groups.values())[-1].items():
        curve = seeds[0]["curve"]
        loss.plot(curve["seconds"], curve["loss"], color=colors[name], label=name)
    loss.set(title=f"loss, {list(groups)[-1]}", xlabel="seconds")
    for axes in (knn, linear, loss):
        axes.spines[["top", "right"]].set_visible(False)
    knn.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def draw_accuracy(axes: Axes, points: Sequence[Sequence[Record]], accuracy: str, color: str, label: str) -> None:
    """Draw a line through the points, each of which has several seeds."""
    x = [statistics.mean(record["seconds"] for record in seeds) for seeds in points]
    y = [mean(seeds, accuracy) for seeds in points]
    below = [high - min(accuracies(seeds, accuracy)) for high, seeds in zip(y, points, strict=True)]
    above = [max(accuracies(seeds, accuracy)) - low for low, seeds in zip(y, points, strict=True)]
    axes.errorbar(x, y, yerr=[below, above], color=color, label=label, marker="o", markersize=4, capsize=3)
