"""The key figures and the charts of runs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastsimclr.progress_bar import duration
from fastsimclr.reporting.charts import Chart, Line, line_chart, share_chart
from fastsimclr.reporting.curves import reduce
from fastsimclr.reporting.numbers import count, number, percent
from fastsimclr.reporting.run_record import Evaluation, Run
from fastsimclr.reporting.settings import device, parameters


def facts(run: Run) -> dict[str, tuple[str, str]]:
    """Return the key figures that are recorded: name to (value, note)."""
    loss, wait = run.steps["loss"], run.shares().get("data_wait")
    waits = f", {percent(wait)} of it waiting for data" if wait is not None else ""
    started = str(run.environment.get("started") or "")[:16].replace("T", " ")
    untrained = f"{percent(run.untrained_knn)} untrained" if run.untrained_knn is not None else ""
    neighbors = f"{run.config['knn_k']} neighbors" if "knn_k" in run.config else ""
    figures = {
        "Final loss": (
            number(loss[-1]),
            f"first step {number(loss[0])}; last epoch’s mean {number(run.epoch_losses[-1])}{_divergence(run)}",
        ),
        "kNN accuracy": (
            percent(run.trained_knn) if run.trained_knn is not None else "",
            "; ".join(filter(None, [untrained, neighbors])),
        ),
        "Online probe": (percent(run.probe) if run.probe is not None else "", "linear classifier"),
        **{
            f"{each.name.capitalize()} top-1": (percent(each.top1), _top5(each))
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
    return {name: fact for name, fact in figures.items() if fact[0]}


def curves(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts, each with one line per run."""
    lengths = {run.steps_per_epoch for run in runs}
    by_epoch = None not in lengths and len(lengths) > 1  # the steps of the runs then differ in length
    x_unit = "epoch" if by_epoch else "step"

    def lines(name: str, *, smooth: bool, scale: float = 1) -> list[Line]:
        found = []
        for index, run in enumerate(runs):
            x = run.steps["step"] / ((by_epoch and run.steps_per_epoch) or 1)
            found.append(Line(run.name, index, reduce(x, scale * run.steps[name]), smooth))
        return found

    def health(title: str, unit: str, name: str, note: str, scale: float = 1) -> Chart | None:
        found = [replace(line, dots=len(line.curve.y) <= 60) for line in lines(name, smooth=False, scale=scale)]
        return line_chart(title, unit, x_unit, found, from_zero=True, note=note)

    charts = [
        line_chart("Loss", "NT-Xent", x_unit, lines("loss", smooth=True)),
        _knn_chart(runs),
        _probe_chart(runs),
        health(
            *("Contrastive accuracy", "%", "contrastive_accuracy"),
            "Views whose positive is the nearest of the batch, of up to 512 images.",
            scale=100,
        ),
        health("Effective rank of h", "dimensions", "effective_rank_h", "RankMe, of up to 512 representations."),
        health("Effective rank of z", "dimensions", "effective_rank_z", "RankMe, of up to 512 projections."),
        line_chart("Throughput", "images/s", x_unit, lines("images_per_second", smooth=True), from_zero=True),
        line_chart("Learning rate", "per step", x_unit, lines("lr", smooth=False), from_zero=True),
    ]
    if len(runs) > 1:
        charts.append(line_chart("Step time", "ms", x_unit, lines("step_ms", smooth=True), from_zero=True))
    else:
        run = runs[0]
        charts.append(share_chart("Where a step’s time goes", x_unit, run.steps["step"], run.stages_ms, run.shares()))
    return [chart for chart in charts if chart is not None]


def epochs(run: Run) -> str:
    """Describe how many of the configured epochs are done."""
    configured, per_epoch = run.config["epochs"], run.steps_per_epoch
    if (steps := run.config.get("steps", "null")) != "null":
        if run.last_step < int(steps):
            return f"part of {int(steps):,} steps"
        return "part of an epoch" if per_epoch is None else f"{run.last_step / per_epoch:.2f} epochs"
    if per_epoch is None:
        return f"part of {configured} epochs"
    done = f"{run.last_step / per_epoch:.2f}".rstrip("0").rstrip(".")
    return f"{done} of {configured} epochs" if done != configured else "1 epoch" if done == "1" else f"{done} epochs"


def _top5(evaluation: Evaluation) -> str:
    return f"top-5 {percent(evaluation.top5)}" if evaluation.top5 is not None else ""


def _divergence(run: Run) -> str:
    """A warning if the loss is above that of uniform similarities, else "".

    An untrained model may begin above that value. Only a loss that no longer falls, epoch by epoch, is a failure.
    """
    uniform, epoch_losses = run.uniform_loss, run.epoch_losses
    if not (epoch_losses[-1] > uniform and run.steps["loss"][-1] > uniform):
        return ""
    failed = len(epoch_losses) > 1 and not epoch_losses[-1] < epoch_losses[:-1].min()
    reason = ": training has likely diverged, or the learning rate is too high" if failed else ""
    return f". Above {number(uniform)}, the loss of uniform similarities{reason}"


def _knn_chart(runs: Sequence[Run]) -> Chart | None:
    found: list[Line] = []
    untrained: dict[int, float] = {}
    chance: dict[float, None] = {}
    images: set[int] = set()
    for index, run in enumerate(runs):
        x = np.array([knn.epoch for knn in run.knn], np.float64)
        y = np.array([100 * knn.accuracy for knn in run.knn], np.float64)
        curve, error = reduce(x, y), None
        if run.untrained_knn is not None:
            untrained[index] = 100 * run.untrained_knn
        if run.knn_data is not None:
            chance[100 / len(run.knn_data.classes)] = None
            if run.knn_data.val_count:
                images.add(run.knn_data.val_count)
                error = 2 * np.sqrt(curve.y * (100 - curve.y) / run.knn_data.val_count)
        found.append(Line(run.name, index, curve, dots=len(y) <= 60, error=error))
    notes = ["Dotted: the untrained encoder."] if len(found) > 1 and untrained else []
    if chance:
        notes.append("Dashed: chance, 1 / number of classes.")
    if images:
        counted = " and ".join(f"{many:,}" for many in sorted(images)) if len(images) <= 2 else "the validation"
        notes.append(f"Bars: ± 2 standard errors (binomial, {counted} images).")
    return line_chart(
        "kNN accuracy", "%", "epoch", found, untrained=untrained, chance=[*chance], from_zero=True, note=" ".join(notes)
    )


def _probe_chart(runs: Sequence[Run]) -> Chart | None:
    found = []
    for index, run in enumerate(runs):
        epochs, accuracies = np.array([(knn.epoch, 100 * knn.probe) for knn in run.knn], np.float64).reshape(-1, 2).T
        found.append(Line(run.name, index, reduce(epochs, accuracies), dots=len(epochs) <= 60))
    note = "Linear classifier that is trained beside the encoder, on the validation images."
    return line_chart("Accuracy of the online probe", "%", "epoch", found, from_zero=True, note=note)
