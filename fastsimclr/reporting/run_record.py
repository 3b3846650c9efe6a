"""What a run has left in its folder, read for a report."""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from fastsimclr.errors import UserError
from fastsimclr.reporting.curves import Floats
from fastsimclr.run_folder import RunFolder

STEP_NUMBERS = ("step", "epoch", "lr", "data_wait", "images_per_second", "step_ms", "images", "loss")


class Knn(NamedTuple):
    """A measurement of kNN accuracy, a fraction, after `step` steps; step 0 is the untrained encoder's."""

    step: int
    epoch: int
    accuracy: float


class Missing(NamedTuple):
    """A part of the page that another command makes and that a run lacks: why, and the command that would make it."""

    what: str
    file: Path
    why: str
    command: str


@dataclass(frozen=True)
class Evaluation:
    """A file of fastsimclr.evaluate. Accuracies are fractions."""

    name: str
    """Of the file, without .json."""
    protocol: str
    origin: str
    top1: float
    top5: float
    classes: list[str]
    per_class: dict[str, float | None]
    confusion: np.ndarray
    """(C, C) images of class (row) taken for class (column); empty if the file has none."""
    train_images: str
    """How many it learned from, and of how many."""
    val_images: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run, and its place among those of the report."""

    folder: RunFolder
    config: dict[str, str]
    """Every option by its whole name: {"loss.temperature": "0.2"}."""
    steps: dict[str, Floats]
    """STEP_NUMBERS, (S,) each; NaN where a line lacks it."""
    stages_ms: dict[str, Floats]
    """Milliseconds of each stage of a step, (S,) each, NaN where a line lacks it. They add up to the step: what is not
    measured is "other", and in a run that measures data_wait alone "compute"."""
    knn: list[Knn]
    skipped_images: int | None
    """None: there were no files to try."""
    environment: dict[str, Any]
    complaints: list[str]
    """What else exists, but could not be read."""
    evaluations: list[Evaluation] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    name: str = ""
    place: int = 0

    @property
    def last_step(self) -> int:
        return int(self.steps["step"][-1])

    @property
    def steps_per_epoch(self) -> float | None:
        """None for a run that ended within its first epoch: its lines do not say it."""
        epoch, step = self.steps["epoch"], self.steps["step"]
        begins = np.flatnonzero(np.diff(epoch) > 0) + 1
        if len(begins):
            return float((step[begins[-1]] - 1) / epoch[begins[-1]])
        return next((knn.step / knn.epoch for knn in self.knn if knn.epoch > 0), None)

    @property
    def untrained_knn(self) -> float | None:
        return next((knn.accuracy for knn in self.knn if knn.step == 0), None)

    @property
    def trained_knn(self) -> float | None:
        return next((knn.accuracy for knn in reversed(self.knn) if knn.step > 0), None)

    @property
    def seconds(self) -> float:
        """Spent in steps, waiting for data included; not in kNN accuracy and the like."""
        return float(np.nansum(self.steps["step_ms"]) / 1000)

    @property
    def last_epochs_loss(self) -> float:
        """The mean loss of the last epoch's worth of steps: an epoch's last batch may be smaller than the others."""
        count = min(len(self.steps["loss"]), round(self.steps_per_epoch or len(self.steps["loss"])))
        losses = self.steps["loss"][-count:]
        return float(losses[np.isfinite(losses)].mean()) if np.isfinite(losses).any() else math.nan

    def median(self, name: str) -> float:
        values = self.steps[name]
        return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan

    def shares(self) -> dict[str, float]:
        """Of the time of all steps whose stages are known, each stage's fraction."""
        total = np.sum(list(self.stages_ms.values()), axis=0)
        known = np.isfinite(total)
        if not total[known].sum() > 0:
            return {}
        return {name: float(values[known].sum() / total[known].sum()) for name, values in self.stages_ms.items()}


def read_run(folder: RunFolder) -> Run:
    """Read a run's folder, except for its evaluations. Raises UserError if it is not a run's, or if its configuration
    or its metrics are damaged."""
    path = folder.path
    for file in (folder.config, folder.metrics):
        if not file.is_file():
            what = f"a folder without {file.name}" if path.is_dir() else "a file" if path.exists() else "nothing there"
            raise UserError(f"{path}: got {what}, expected a run's folder: the --output of fastsimclr.train")
    try:
        config = dict(flattened(yaml.safe_load(folder.config.read_text())))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder.config}: got no options as YAML ({error}), expected the file that train wrote"
        ) from error
    steps, stages, knn, skipped = _read_metrics(folder.metrics)
    complaints: list[str] = []
    environment: dict[str, Any] = {}
    if folder.environment.is_file():
        try:
            environment = dict(json.loads(folder.environment.read_text()))
        except (OSError, ValueError, TypeError) as error:
            complaints.append(_complaint(folder, folder.environment, error))
    return Run(folder, config, steps, stages, knn, skipped, environment, complaints)


def read_evaluations(run: Run) -> Run:
    """The run with the evaluations that its folder holds by now."""
    evaluations, complaints = [], list(run.complaints)
    for file in sorted(run.folder.evaluate.glob("*.json")):
        try:
            evaluations.append(_evaluation(file))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            complaints.append(_complaint(run.folder, file, error))
    return replace(run, evaluations=evaluations, complaints=complaints)


def _complaint(folder: RunFolder, file: Path, error: Exception) -> str:
    return f"{file.relative_to(folder.path)} could not be read ({type(error).__name__}: {error})"


def flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested options as (name with dots, text of the value)."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _read_metrics(file: Path) -> tuple[dict[str, Floats], dict[str, Floats], list[Knn], int | None]:
    numbers = array("d")
    stages: list[dict[str, float]] = []
    knn: list[Knn] = []
    skipped: int | None = None
    with open(file, "rb") as lines:
        for place, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                step = int(record["step"])
                if "loss" in record:
                    values = [float(record.get(name, np.nan)) for name in STEP_NUMBERS]
                    stages.append({name: float(ms) for name, ms in record.get("stages_ms", {}).items()})
                    numbers.extend(values)
                elif "knn_accuracy" in record:
                    knn.append(Knn(step, int(record["epoch"]), float(record["knn_accuracy"])))
                elif "skipped_images" in record:
                    skipped = int(record["skipped_images"])
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                if not line.endswith(b"\n"):
                    break  # the last, torn: the run was killed, or writes it now
                shown = line[:60].decode(errors="replace").strip()
                raise UserError(
                    f"{file}: got {shown!r} in line {place}, expected a JSON object as train writes them; "
                    "remove that line"
                ) from error
    if not stages:
        raise UserError(f"{file}: got no step in it, expected one at least; wait for the first, or train again")
    columns = np.array(numbers).reshape(-1, len(STEP_NUMBERS)).T
    steps = dict(zip(STEP_NUMBERS, columns, strict=True))
    return steps, _stages(steps, stages), knn, skipped


def _stages(steps: dict[str, Floats], measured: list[dict[str, float]]) -> dict[str, Floats]:
    """Each stage's milliseconds, (S,), with the rest of a step as a stage of its own."""
    names = dict.fromkeys(name for each in measured for name in each)
    stages = {name: np.array([each.get(name, np.nan) for each in measured]) for name in names}
    if "data_wait" not in stages:
        stages = {"data_wait": 1000 * steps["data_wait"], **stages}
    rest = np.maximum(steps["step_ms"] - sum(stages.values()), 0)
    if len(stages) == 1:
        return {**stages, "compute": rest}
    if np.nansum(rest) > 0.005 * np.nansum(steps["step_ms"]):
        stages["other"] = rest
    return stages


def _evaluation(file: Path) -> Evaluation:
    record = json.loads(file.read_text())
    classes = [str(name) for name in record.get("classes") or record["per_class"]]
    return Evaluation(
        name=file.stem,
        protocol=str(record["protocol"]),
        origin=str(record.get("origin", "")),
        top1=float(record["top1"]),
        top5=float(record["top5"]),
        classes=classes,
        per_class={str(name): value if value is None else float(value) for name, value in record["per_class"].items()},
        confusion=np.array(record.get("confusion") or [], dtype=np.int64),
        train_images=_images(record.get("train") or {}),
        val_images=_images(record.get("val") or {}),
        settings=dict(record.get("settings") or {}),
    )


def _images(data: dict[str, Any]) -> str:
    images, of = data.get("images"), data.get("of")
    if not isinstance(images, int):
        return "–"
    return f"{images:,} of {of:,} images" if isinstance(of, int) and of != images else f"{images:,} images"
