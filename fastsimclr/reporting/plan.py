"""Read runs on one device, and predict what they take on several ranks: `fastsimclr plan`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from fastsimclr.errors import UserError
from fastsimclr.metrics_file import read_records
from fastsimclr.progress_bar import duration
from fastsimclr.reporting.numbers import count, percent
from fastsimclr.reporting.run_record import Run, read_run
from fastsimclr.reporting.scaling import Cluster, Measured, Prediction, Setup, Step, find_limits, predict
from fastsimclr.run_folder import RunFolder

WARM_UP_STEPS, MIN_STEPS = 5, 10
"""Steps that are not used, as cuDNN benchmarks algorithms in them, and the least number of others."""
VIEWS, NEEDED = ("data_wait", "views", "copy"), ("forward", "backward", "loss", "optimizer")
"""Stages of waiting for views, and the other stages that a run must have measured."""
MOST_RANKS = 4096
"""Limits of the scaling are looked for up to this many ranks."""
MIN_LOCAL_BATCH = 2  # as in training


@dataclass(frozen=True)
class Plan:
    """Predictions from one or two runs."""

    runs: list[str]
    measured: Measured
    cluster: Cluster
    predictions: list[Prediction]
    limits: list[str]
    """Lines that say from which number of ranks on a part limits the scaling."""

    def describe(self) -> str:
        """Return the lines to print."""
        setup, cluster = self.measured.setup, self.cluster
        device = "a GPU" if setup.on_gpu else f"a CPU with {count(setup.threads, 'thread')}"
        lines = [
            f"measured: {run}, {setup.encoder}, {step.steps} steps of {count(step.batch_size, 'image')} on {device}, "
            f"{step.step_ms:.1f} ms each"
            for run, step in zip(self.runs, self.measured.steps, strict=True)
        ]
        shared = f", {count(cluster.cores, 'core')} for all ranks" if cluster.cores else ""
        lines += [
            f"predicted: {cluster.bandwidth:g} GB/s, {cluster.latency_us:g} µs per collective{shared}; parts in ms"
        ]
        rows = [["ranks", "batch", *self.predictions[0].parts_ms, "step ms", "images/s", "epoch", "efficiency", "MiB"]]
        rows += map(_cells, self.predictions)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.rjust, row, widths)) for row in rows]
        return "\n".join([*lines, *self.limits])


def make_plan(
    runs: Sequence[str],
    cluster: Cluster,
    ranks: Sequence[int],
    *,
    batch_size: int | None = None,
    local_batch_size: int | None = None,
    images: int | None = None,
) -> Plan:
    """Predict the runs in the folders `runs` on each of these numbers of ranks.

    runs: one, or two that differ in their batch size. batch_size: images per step over all ranks. local_batch_size:
    images per step and rank, used if batch_size is None; default: the largest of the runs. images: in an epoch;
    default: those of the runs.
    Raises UserError if a run was not one process, did not measure enough, or the batch is too small for the ranks.
    """
    measured, runs = read_runs(runs)
    local = local_batch_size or measured.steps[-1].batch_size

    def predict_for(many: int) -> Prediction:
        return predict(measured, cluster, many, batch_size or local * many, images or measured.setup.images)

    if (local if batch_size is None else batch_size // max(ranks)) < MIN_LOCAL_BATCH:
        got = f"local_batch_size: got {local}" if batch_size is None else f"batch_size: got {batch_size}"
        raise UserError(f"--{got} on {max(ranks)} ranks, expected at least {MIN_LOCAL_BATCH} images per rank")
    most = MOST_RANKS if batch_size is None else min(MOST_RANKS, batch_size // MIN_LOCAL_BATCH)
    limits = find_limits(map(predict_for, range(1, most + 1)))
    return Plan(runs, measured, cluster, [predict_for(many) for many in ranks], limits)


def read_runs(runs: Sequence[str]) -> tuple[Measured, list[str]]:
    """Return what the runs have measured, and their folders, by batch size."""
    if len(runs) > 2:
        raise UserError(f"RUN: got {len(runs)} runs, expected one or two")
    found = sorted(((*_read(RunFolder(run)), run) for run in runs), key=lambda each: each[1].batch_size)
    setups, steps, folders = zip(*found, strict=True)
    for name in (field.name for field in fields(Setup)):
        values = [getattr(setup, name) for setup in setups]
        if values[0] != values[-1] and name != "activation_mib_per_image":
            raise UserError(f"RUN: got runs that differ in {name}, {values[0]} and {values[-1]}, expected the same")
    if len({step.batch_size for step in steps}) < len(steps):
        raise UserError(f"RUN: got two runs of batch size {steps[0].batch_size}, expected different ones")
    return Measured(setups[-1], steps), list(folders)


def _read(folder: RunFolder) -> tuple[Setup, Step]:
    """Read a run of one process. Raises UserError if something is missing."""
    run = read_run(folder)
    known, config = run.environment, run.config
    needed = ("world_size", "device", "threads", "images", "parameters", "batch_norms", "optimizer", "loss_backend")
    if missing := [name for name in needed if name not in known]:
        raise UserError(f"{folder.environment}: got no {', '.join(missing)}, expected a run of this version")
    if known["world_size"] != 1:
        raise UserError(f"{folder}: got a run of {known['world_size']} ranks, expected one of a single process")
    batch_size = int(config["batch_size"])
    stages_ms, steps = _mean_stages(run, batch_size)
    peaks = [record["peak_mib"] for record in read_records(folder.metrics) if record.get("peak_mib")]
    micro_batch_size = config.get("micro_batch_size", "null")
    setup = Setup(
        encoder=config["model.encoder"],
        on_gpu=known["device"].startswith("cuda"),
        threads=known["threads"],
        images=known["images"],
        micro_batch_size=None if micro_batch_size == "null" else int(micro_batch_size),
        num_views=int(config["data.num_views"]),
        parameters=known["parameters"],
        parameter_bytes=8 if config["precision"] == "fp64" else 4,
        optimizer=known["optimizer"],
        synchronized_norms=known["batch_norms"] if config["model.sync_bn"] == "true" else 0,
        projection_width=int(config["model.out"]),
        loss_backend=known["loss_backend"].split()[0],
        global_negatives=config["loss.global_negatives"] == "true",
        activation_mib_per_image=known.get("activation_mib_per_image"),
    )
    step = Step(
        steps=steps,
        batch_size=batch_size,
        **{f"{name}_ms": stages_ms[name] for name in NEEDED},
        views_ms=sum(stages_ms.get(name, 0.0) for name in VIEWS),
        other_ms=sum(ms for name, ms in stages_ms.items() if name not in (*VIEWS, *NEEDED)),
        peak_mib=max(peaks, default=None),
    )
    return setup, step


def _mean_stages(run: Run, batch_size: int) -> tuple[dict[str, float], int]:
    """Return the milliseconds of each stage in a step with a whole batch, and the number of these steps.

    They are medians, but means for the views: workers deliver several batches at a time.
    """
    if missing := [name for name in NEEDED if name not in run.stages_ms]:
        raise UserError(f"{run.folder.metrics}: got no times of {', '.join(missing)}, expected a run of this version")
    is_used = (run.steps["images"] == batch_size) & np.isfinite(sum(run.stages_ms.values()))
    is_used[:WARM_UP_STEPS] = False
    steps = int(is_used.sum())
    if steps < MIN_STEPS:
        raise UserError(
            f"{run.folder.metrics}: got {steps} steps of {count(batch_size, 'image')} after the first {WARM_UP_STEPS}, "
            f"expected at least {MIN_STEPS}: train longer"
        )
    used = {name: ms[is_used] for name, ms in run.stages_ms.items()}
    return {name: float(np.mean(ms) if name in VIEWS else np.median(ms)) for name, ms in used.items()}, steps


def _cells(prediction: Prediction) -> list[str]:
    memory = prediction.memory_mib
    return [
        f"{prediction.ranks:,}",
        f"{prediction.batch_size:,}",
        *(f"{ms:.1f}" for ms in prediction.parts_ms.values()),
        f"{prediction.step_ms:.1f}",
        f"{prediction.images_per_second:,.0f}",
        duration(prediction.epoch_seconds),
        percent(prediction.efficiency),
        "–" if memory is None else f"{memory:,.0f}",
    ]
