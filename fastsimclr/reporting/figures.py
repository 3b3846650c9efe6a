"""What a run came to: its figures as tiles, those of several as a table, and their curves."""

from collections.abc import Sequence

import numpy as np

from fastsimclr.reporting.charts import Level, Line, line_chart, share_chart, stage_bar, stage_style, swatch
from fastsimclr.reporting.curves import Floats, reduce
from fastsimclr.reporting.markup import Child, Html, element, join, table
from fastsimclr.reporting.numbers import count, duration, number, percent
from fastsimclr.reporting.run_record import Run
from fastsimclr.reporting.settings import device, parameters


def tiles(run: Run) -> Html:
    """The figures that one looks for first."""
    loss, wait = run.steps["loss"], run.shares().get("data_wait")
    waits = f"; {percent(wait)} waits for data" if wait is not None else ""
    started = str(run.environment.get("started") or "")[:16].replace("T", " ")
    neighbours = f"{run.config['knn_k']} neighbours" if "knn_k" in run.config else ""
    untrained = f"{percent(run.untrained_knn)} untrained" if run.untrained_knn is not None else ""
    images_per_second = number(run.median("images_per_second"), 3)
    where, how = device(run)
    losses = f"{number(loss[0])} at first; last epoch’s mean {number(run.last_epochs_loss)}"
    shown: list[tuple[str, Child, str]] = [("Final loss", number(loss[-1]), losses)]
    if run.trained_knn is not None:
        shown.append(("kNN accuracy", percent(run.trained_knn), "; ".join(filter(None, [untrained, neighbours]))))
    shown += [
        (f"{each.name.capitalize()} top-1", percent(each.top1), f"top-5 {percent(each.top5)}")
        for each in run.evaluations
        if each.protocol != "knn"
    ]
    shown += [
        ("Throughput", [images_per_second, element("small", " images/s")], f"median of the steps{waits}"),
        ("Trained", _epochs(run), count(run.last_step, "step")),
        ("Time in steps", duration(run.seconds), f"started {started}" if started else ""),
        ("Parameters", *parameters(run)),
        ("Device", element("span", where, class_="words") if where else "", how),
    ]
    return element("dl", [_tile(*tile) for tile in shown if tile[1]], class_="tiles")


def summary_table(runs: Sequence[Run]) -> Html:
    """One row a run."""
    protocols = list(dict.fromkeys(evaluation.name for run in runs for evaluation in run.evaluations))
    head = ["run", "final loss", "last epoch’s mean", "kNN", "untrained", *(f"{name} top-1" for name in protocols)]
    head += ["images/s", "step", "waits for data", "trained", "steps", "time in steps", "device"]
    rows: list[list[Child]] = []
    for place, run in enumerate(runs):
        top1 = {evaluation.name: evaluation.top1 for evaluation in run.evaluations}
        rows.append(
            [
                element("span", swatch(place), " ", run.name, class_="run"),
                number(run.steps["loss"][-1]),
                number(run.last_epochs_loss),
                _share(run.trained_knn),
                _share(run.untrained_knn),
                *(_share(top1.get(name)) for name in protocols),
                number(run.median("images_per_second"), 3),
                f"{number(run.median('step_ms'), 3)} ms",
                _share(run.shares().get("data_wait")),
                _epochs(run),
                f"{run.last_step:,}",
                duration(run.seconds),
                device(run)[0] or "–",
            ]
        )
    return table(head, rows, label="The runs", class_="figures")


def curves(runs: Sequence[Run]) -> Html:
    """The charts, each with a line a run."""
    several, one = len(runs) > 1, runs[0]
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
        line_chart("Step time", "ms", x_unit, lines("step_ms", smooth=True), from_zero=True)
        if several
        else share_chart("Where a step’s time goes", x_unit, one.steps["step"], one.stages_ms, one.shares()),
    ]
    legend = None
    if several:
        names = [element("li", swatch(place), " ", run.name) for place, run in enumerate(runs)]
        legend = element("ul", names, class_="legend" + (" sticky" if len(runs) <= 4 else ""))
    return join([legend, element("div", charts, class_="charts"), element("p", _how_drawn(runs), class_="note")])


def _how_drawn(runs: Sequence[Run]) -> str:
    bins = max(reduce(run.steps["step"], run.steps["loss"]).steps_a_bin for run in runs)
    smooth = "Loss, throughput and step time" if len(runs) > 1 else "Loss and throughput"
    behind = f"the lowest to the highest of up to {bins:,} steps" if bins > 1 else "each step"
    return f"{smooth} are smoothed; behind them, faint: {behind}."


def stages(runs: Sequence[Run]) -> Html | None:
    """Each run's stages as a bar."""
    shares = [run.shares() for run in runs]
    names = list(dict.fromkeys(name for each in shares for name in each))
    if not names:
        return None
    rows: list[list[Child]] = []
    for place, (run, each) in enumerate(zip(runs, shares, strict=True)):
        filled = {name: each.get(name, 0.0) for name in names}
        figures = [percent(each[name]) if name in each else "–" for name in names]
        rows.append([element("span", swatch(place), " ", run.name, class_="run"), stage_bar(filled), *figures])
    heads = [join([element("i", class_=f"key {stage_style(name, names)}"), name.replace("_", " ")]) for name in names]
    return table(["run", "", *heads], rows, label="Where a step’s time goes", class_="figures stages")


def _knn_chart(runs: Sequence[Run]) -> Html:
    by_epoch = all(run.steps_per_epoch for run in runs)
    found, levels = [], []
    for place, run in enumerate(runs):
        x = np.array([knn.step / (run.steps_per_epoch or 1) if by_epoch else knn.step for knn in run.knn], np.float64)
        y = np.array([100 * knn.accuracy for knn in run.knn], np.float64)
        found.append(Line(run.name, place, reduce(x, y), dots=len(y) <= 60))
        if run.untrained_knn is not None:
            levels.append(Level("untrained", 100 * run.untrained_knn, place))
    note = "Dotted: the untrained encoder." if len(levels) > 1 else ""
    return line_chart("kNN accuracy", "%", "epoch" if by_epoch else "step", found, levels=levels, note=note)


def _x(run: Run, by_epoch: bool) -> Floats:
    return run.steps["step"] / run.steps_per_epoch if by_epoch and run.steps_per_epoch else run.steps["step"]


def _tile(name: str, value: Child, note: str) -> Html:
    return element(
        "div", element("dt", name), element("dd", value), element("dd", note, class_="soft") if note else None
    )


def _share(fraction: float | None) -> str:
    return "–" if fraction is None else percent(fraction)


def _epochs(run: Run) -> str:
    """How many of the configured epochs are done."""
    asked, done = run.config.get("epochs", ""), run.epochs_done
    if done is None:
        return f"part of {asked} epochs" if asked else "part of an epoch"
    whole = f"{round(done, 2):g}"
    return (
        f"{whole} of {asked} epochs" if asked and whole != asked else "1 epoch" if whole == "1" else f"{whole} epochs"
    )
