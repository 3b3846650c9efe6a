"""What a run came to: its figures, and its curves."""

from collections.abc import Sequence

import numpy as np

from fastsimclr.progress_bar import duration
from fastsimclr.reporting.charts import Chart, Line, line_chart, share_chart
from fastsimclr.reporting.curves import reduce
from fastsimclr.reporting.numbers import count, number, percent
from fastsimclr.reporting.run_record import Run
from fastsimclr.reporting.settings import device, parameters


def facts(run: Run) -> dict[str, tuple[str, str]]:
    """The figures that one looks for first, as far as they are known: by their names, a value and a note."""
    loss, wait = run.steps["loss"], run.shares().get("data_wait")
    waits = f", {percent(wait)} of it waiting for data" if wait is not None else ""
    started = str(run.environment.get("started") or "")[:16].replace("T", " ")
    untrained = f"{percent(run.untrained_knn)} untrained" if run.untrained_knn is not None else ""
    neighbors = f"{run.config['knn_k']} neighbors" if "knn_k" in run.config else ""
    shown = {
        "Final loss": (
            number(loss[-1]),
            f"{number(loss[0])} at first; last epoch’s mean {number(run.last_epochs_loss)}",
        ),
        "kNN accuracy": (
            percent(run.trained_knn) if run.trained_knn is not None else "",
            "; ".join(filter(None, [untrained, neighbors])),
        ),
        **{
            f"{each.name.capitalize()} top-1": (percent(each.top1), f"top-5 {percent(each.top5)}")
            for each in run.evaluations
            if each.protocol != "knn"
        },
        "Throughput": (
            f"{number(run.median('images_per_second'), 3)} images/s",
            f"median step {number(run.median('step_ms'), 3)} ms{waits}",
        ),
        "Trained": (epochs(run), count(run.last_step, "step")),
        "Time in steps": (duration(run.seconds), f"started {started}" if started else ""),
        "Parameters": parameters(run),
        "Device": device(run),
    }
    return {name: fact for name, fact in shown.items() if fact[0]}


def curves(runs: Sequence[Run]) -> list[Chart]:
    """The charts, each with a line a run."""
    lengths = {run.steps_per_epoch for run in runs}
    by_epoch = None not in lengths and len(lengths) > 1  # steps of different runs then are not alike
    x_unit = "epoch" if by_epoch else "step"

    def lines(name: str, *, smooth: bool) -> list[Line]:
        found = []
        for place, run in enumerate(runs):
            x = run.steps["step"] / ((by_epoch and run.steps_per_epoch) or 1)
            found.append(Line(run.name, place, reduce(x, run.steps[name]), smooth))
        return found

    charts = [
        line_chart("Loss", "NT-Xent", x_unit, lines("loss", smooth=True)),
        _knn_chart(runs),
        line_chart("Throughput", "images/s", x_unit, lines("images_per_second", smooth=True), from_zero=True),
        line_chart("Learning rate", "per step", x_unit, lines("lr", smooth=False), from_zero=True),
    ]
    if len(runs) > 1:
        charts.append(line_chart("Step time", "ms", x_unit, lines("step_ms", smooth=True), from_zero=True))
    else:
        one = runs[0]
        charts.append(share_chart("Where a step’s time goes", x_unit, one.steps["step"], one.stages_ms, one.shares()))
    return [chart for chart in charts if chart is not None]


def epochs(run: Run) -> str:
    """How many of the configured epochs are done."""
    asked, per_epoch = run.config["epochs"], run.steps_per_epoch
    if per_epoch is None:
        return f"part of {asked} epochs"
    done = f"{run.last_step / per_epoch:.2f}".rstrip("0").rstrip(".")
    return f"{done} of {asked} epochs" if done != asked else "1 epoch" if done == "1" else f"{done} epochs"


def _knn_chart(runs: Sequence[Run]) -> Chart | None:
    found: list[Line] = []
    untrained: dict[int, float] = {}
    for place, run in enumerate(runs):
        x = np.array([knn.epoch for knn in run.knn], np.float64)
        y = np.array([100 * knn.accuracy for knn in run.knn], np.float64)
        found.append(Line(run.name, place, reduce(x, y), dots=len(y) <= 60))
        if run.untrained_knn is not None:
            untrained[place] = 100 * run.untrained_knn
    note = "Dotted: the untrained encoder." if len(found) > 1 and untrained else ""
    return line_chart("kNN accuracy", "%", "epoch", found, untrained=untrained, note=note)
