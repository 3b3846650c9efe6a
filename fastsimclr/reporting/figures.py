"""What a run came to: its figures as tiles, those of several as a table, and their curves."""

from collections.abc import Sequence

import numpy as np

from fastsimclr.reporting.charts import Chart, Line, line_chart, share_chart
from fastsimclr.reporting.curves import Floats, reduce
from fastsimclr.reporting.numbers import count, duration, number, percent
from fastsimclr.reporting.run_record import Run
from fastsimclr.reporting.settings import device, parameters


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures that one looks for first: name, value, note."""
    loss, wait = run.steps["loss"], run.shares().get("data_wait")
    waits = f"; {percent(wait)} waits for data" if wait is not None else ""
    started = str(run.environment.get("started") or "")[:16].replace("T", " ")
    untrained = f"{percent(run.untrained_knn)} untrained" if run.untrained_knn is not None else ""
    neighbors = f"{run.config['knn_k']} neighbors" if "knn_k" in run.config else ""
    shown = [
        (
            "Final loss",
            number(loss[-1]),
            f"{number(loss[0])} at first; last epoch’s mean {number(run.last_epochs_loss)}",
        ),
        ("kNN accuracy", share(run.trained_knn, ""), "; ".join(filter(None, [untrained, neighbors]))),
        *(
            (f"{each.name.capitalize()} top-1", percent(each.top1), f"top-5 {percent(each.top5)}")
            for each in run.evaluations
            if each.protocol != "knn"
        ),
        ("Throughput", f"{number(run.median('images_per_second'), 3)} images/s", f"median of the steps{waits}"),
        ("Trained", epochs(run), count(run.last_step, "step")),
        ("Time in steps", duration(run.seconds), f"started {started}" if started else ""),
        ("Parameters", *parameters(run)),
        ("Device", *device(run)),
    ]
    return [tile for tile in shown if tile[1]]


def summary(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The same of several runs, as a table: its head, and a row a run."""
    protocols = list(dict.fromkeys(evaluation.name for run in runs for evaluation in run.evaluations))
    head = ["final loss", "last epoch’s mean", "kNN", "untrained", *(f"{name} top-1" for name in protocols)]
    head += ["images/s", "step", "waits for data", "trained", "steps", "time in steps", "device"]
    rows = []
    for run in runs:
        top1 = {evaluation.name: evaluation.top1 for evaluation in run.evaluations}
        rows.append(
            [
                number(run.steps["loss"][-1]),
                number(run.last_epochs_loss),
                share(run.trained_knn),
                share(run.untrained_knn),
                *(share(top1.get(name)) for name in protocols),
                number(run.median("images_per_second"), 3),
                f"{number(run.median('step_ms'), 3)} ms",
                share(run.shares().get("data_wait")),
                epochs(run),
                f"{run.last_step:,}",
                duration(run.seconds),
                device(run)[0] or "–",
            ]
        )
    return head, rows


def curves(runs: Sequence[Run]) -> list[Chart]:
    """The charts, each with a line a run."""
    lengths = {run.steps_per_epoch for run in runs}
    by_epoch = None not in lengths and len(lengths) > 1  # steps of different runs then are not alike
    x_unit = "epoch" if by_epoch else "step"

    def lines(name: str, *, smooth: bool) -> list[Line]:
        return [
            Line(run.name, place, reduce(_x(run, by_epoch), run.steps[name]), smooth) for place, run in enumerate(runs)
        ]

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


def how_drawn(runs: Sequence[Run]) -> str:
    """A note on the curves."""
    bins = max(reduce(run.steps["step"], run.steps["loss"]).steps_a_bin for run in runs)
    smooth = "Loss, throughput and step time" if len(runs) > 1 else "Loss and throughput"
    faint = f"the lowest to the highest of up to {bins:,} steps" if bins > 1 else "each step"
    return f"{smooth} are smoothed; behind them, faint: {faint}."


def share(fraction: float | None, unknown: str = "–") -> str:
    return unknown if fraction is None else percent(fraction)


def epochs(run: Run) -> str:
    """How many of the configured epochs are done."""
    asked, done = run.config.get("epochs", ""), run.epochs_done
    if done is None:
        return f"part of {asked} epochs" if asked else "part of an epoch"
    whole = f"{round(done, 2):g}"
    if asked and whole != asked:
        return f"{whole} of {asked} epochs"
    return "1 epoch" if whole == "1" else f"{whole} epochs"


def _knn_chart(runs: Sequence[Run]) -> Chart | None:
    by_epoch = all(run.steps_per_epoch for run in runs)
    found: list[Line] = []
    untrained: dict[int, float] = {}
    for place, run in enumerate(runs):
        x = np.array([knn.step / (run.steps_per_epoch or 1) if by_epoch else knn.step for knn in run.knn], np.float64)
        y = np.array([100 * knn.accuracy for knn in run.knn], np.float64)
        found.append(Line(run.name, place, reduce(x, y), dots=len(y) <= 60))
        if run.untrained_knn is not None:
            untrained[place] = 100 * run.untrained_knn
    note = "Dotted: the untrained encoder." if len(found) > 1 and untrained else ""
    return line_chart("kNN accuracy", "%", "epoch" if by_epoch else "step", found, untrained=untrained, note=note)


def _x(run: Run, by_epoch: bool) -> Floats:
    return run.steps["step"] / run.steps_per_epoch if by_epoch and run.steps_per_epoch else run.steps["step"]
