"""Read the record of a run from its folder."""

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
from fastsimclr.metrics_file import read_lines
from fastsimclr.reporting.curves import Floats
from fastsimclr.run_folder import RunFolder

HEALTH = ("contrastive_accuracy", "effective_rank_h", "effective_rank_z")  # of some steps
STEP_NUMBERS = ("step", "epoch", "lr", "data_wait", "images_per_second", "step_ms", "images", "loss", *HEALTH)
DATA_OPTIONS = ("data.train", "data.val")


KNN_NUMBERS = ("step", "epoch", "knn_accuracy", "probe_accuracy")


class Knn(NamedTuple):
    """The kNN accuracy, a fraction, after `step` steps. Step 0: the untrained encoder."""

    step: int
    epoch: int
    accuracy: float
    probe: float = math.nan
    """Accuracy of the online linear probe; NaN if there is none."""


class Missing(NamedTuple):
    """A part of the page that a run lacks, with the reason and the command that makes it."""

    what: str
    file: Path
    why: str
    command: str


@dataclass(frozen=True)
class Evaluation:
    """The results of fastsimclr.evaluate in one file. Accuracies are fractions."""

    name: str
    """Name of the file, without .json."""
    protocol: str
    origin: str
    top1: float
    top5: float | None
    """None with at most five classes, where it is always 1."""
    classes: list[str]
    per_class: dict[str, float | None]
    confusion: np.ndarray
    """(C, C) number of images of class (row) predicted as class (column); empty if not recorded."""
    train_images: str
    """Number of labeled images used, and available."""
    val_images: str
    val_count: int | None
    settings: dict[str, Any]
    data: dict[str, str]
    """The options data.train and data.val; empty if not recorded."""


@dataclass(frozen=True)
class Run:
    """A run, and its name and index in the report."""

    folder: RunFolder
    config: dict[str, str]
    """All options by their full names: {"loss.temperature": "0.2"}."""
    steps: dict[str, Floats]
    """STEP_NUMBERS, (S,) each; NaN where not recorded."""
    stages_ms: dict[str, Floats]
    """Milliseconds of each stage, (S,) each, NaN where not recorded. They add up to the step time: the unmeasured rest
    is "other", or "compute" in a run that measures only data_wait."""
    knn: list[Knn]
    skipped_images: int | None
    """None if the data are not image files."""
    environment: dict[str, Any]
    warnings: list[str]
    """Files that could not be read, with the reasons."""
    evaluations: list[Evaluation] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    name: str = ""
    index: int = 0

    @property
    def last_step(self) -> int:
        return int(self.steps["step"][-1])

    @property
    def steps_per_epoch(self) -> float | None:
        """None for a run that ended within its first epoch, which does not record it."""
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
    def probe(self) -> float | None:
        """The latest accuracy of the online linear probe."""
        return next((knn.probe for knn in reversed(self.knn) if not math.isnan(knn.probe)), None)

    @property
    def knn_data(self) -> Evaluation | None:
        """The kNN evaluation of the same data as the run's kNN curve: it records the classes and images."""
        own = {name: self.config.get(name, "null") for name in DATA_OPTIONS}
        return next((each for each in self.evaluations if each.protocol == "knn" and each.data == own), None)

    @property
    def seconds(self) -> float:
        """Time spent in steps, including data wait, but not kNN evaluations and checkpoints."""
        return float(np.nansum(self.steps["step_ms"]) / 1000)

    @property
    def epoch_losses(self) -> Floats:
        """Mean losses of consecutive steps_per_epoch steps, the last of which are the run's last steps, (E,), E >= 1.

        A mean, because the last batch of an epoch may be smaller than the others.
        """
        losses, length = self.steps["loss"], self._last_epoch
        epochs = losses[len(losses) % length :].reshape(-1, length)
        return np.ma.masked_invalid(epochs).mean(axis=1).filled(np.nan)  # skipped steps have no loss

    @property
    def uniform_loss(self) -> float:
        """Mean loss of the last steps_per_epoch steps if all similarities were equal: ln(2N - 1) for N images.

        NaN if N is not recorded.
        """
        ranks = int(self.environment.get("world_size") or 1)
        images = self.steps["images"][-self._last_epoch :]
        if self.config.get("loss.global_negatives") == "false":
            images = images / ranks
        excluded = 2 if self.config.get("loss.decoupled") == "true" else 1
        return float(np.log(np.maximum(2 * images - excluded, 1)).mean())

    @property
    def _last_epoch(self) -> int:
        """Number of steps of the last epoch, or of a run that ended within its first."""
        steps = len(self.steps["loss"])
        return max(1, min(steps, round(self.steps_per_epoch or steps)))

    def median(self, name: str) -> float:
        values = self.steps[name]
        return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan

    def shares(self) -> dict[str, float]:
        """Return the fraction of each stage in the total time of the steps that record their stages."""
        total = np.sum(list(self.stages_ms.values()), axis=0)
        known = np.isfinite(total)
        if not total[known].sum() > 0:
            return {}
        return {name: float(values[known].sum() / total[known].sum()) for name, values in self.stages_ms.items()}


def read_run(folder: RunFolder) -> Run:
    """Read a run's folder, except its evaluations.

    Raises UserError if it is not a run's folder, or if its configuration or metrics are damaged.
    """
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
    warnings: list[str] = []
    steps, stages, knn, skipped = _read_metrics(folder.metrics, warnings)
    environment: dict[str, Any] = {}
    if folder.environment.is_file():
        try:
            environment = dict(json.loads(folder.environment.read_text()))
        except (OSError, ValueError, TypeError) as error:
            warnings.append(_warning(folder, folder.environment, error))
    return Run(folder, config, steps, stages, knn, skipped, environment, warnings)


def read_evaluations(run: Run) -> Run:
    """Return the run with the evaluations that are now in its folder."""
    evaluations, warnings = [], list(run.warnings)
    for file in sorted(run.folder.evaluate.glob("*.json")):
        try:
            evaluations.append(_evaluation(file))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.append(_warning(run.folder, file, error))
    return replace(run, evaluations=evaluations, warnings=warnings)


def _warning(folder: RunFolder, file: Path, error: Exception) -> str:
    return f"{file.relative_to(folder.path)} could not be read ({type(error).__name__}: {error})"


def flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested options as (name with dots, value as text)."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _read_metrics(
    file: Path, warnings: list[str]
) -> tuple[dict[str, Floats], dict[str, Floats], list[Knn], int | None]:
    numbers = array("d")
    stages: list[dict[str, float]] = []
    knn: list[Knn] = []
    skipped: int | None = None
    damaged = 0
    for line, record in read_lines(file):
        if record is None:
            damaged += line.endswith(b"\n")  # otherwise the run was killed while it wrote the line, or is writing it
        elif "loss" in record:
            numbers.extend(float(record.get(name, np.nan)) for name in STEP_NUMBERS)
            stages.append(record.get("stages_ms", {}))
        elif "knn_accuracy" in record:
            knn.append(Knn(*(record.get(name, math.nan) for name in KNN_NUMBERS)))
        elif "skipped_images" in record:
            skipped = record["skipped_images"]
    if damaged:
        warnings.append(f"{file.name} has {damaged} damaged line{'s' * (damaged > 1)}")
    if not stages:
        raise UserError(f"{file}: got no step, expected at least one; wait for the first step, or train again")
    columns = np.array(numbers).reshape(-1, len(STEP_NUMBERS)).T
    steps = dict(zip(STEP_NUMBERS, columns, strict=True))
    return steps, _stages(steps, stages), knn, skipped


def _stages(steps: dict[str, Floats], measured: list[dict[str, float]]) -> dict[str, Floats]:
    """Milliseconds of each stage, (S,), with the rest of the step as an additional stage."""
    names = dict.fromkeys(name for each in measured for name in each)
    stages = {name: np.array([each.get(name, 0.0 if each else np.nan) for each in measured]) for name in names}
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
    options = dict(flattened(record.get("options") or {}))
    return Evaluation(
        name=file.stem,
        protocol=str(record["protocol"]),
        origin=str(record.get("origin", "")),
        top1=float(record["top1"]),
        top5=float(record["top5"]) if len(classes) > 5 else None,
        classes=classes,
        per_class={str(name): value if value is None else float(value) for name, value in record["per_class"].items()},
        confusion=np.array(record.get("confusion") or [], dtype=np.int64),
        train_images=_images(record.get("train") or {}),
        val_images=_images(record.get("val") or {}),
        val_count=(record.get("val") or {}).get("images"),
        settings=dict(record.get("settings") or {}),
        data={name: options.get(name, "null") for name in DATA_OPTIONS} if options else {},
    )


def _images(data: dict[str, Any]) -> str:
    images, of = data.get("images"), data.get("of")
    if not isinstance(images, int):
        return "–"
    return f"{images:,} of {of:,} images" if isinstance(of, int) and of != images else f"{images:,} images"
