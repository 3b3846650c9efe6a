"""Loggers: callbacks that send the metrics of a run to TensorBoard, Weights & Biases or MLflow."""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from fastsimclr.config import Config
from fastsimclr.distributed import World
from fastsimclr.errors import UserError
from fastsimclr.run_folder import write_text
from fastsimclr.training.callbacks import Callback, TrainerInterface

PROJECT = "fastsimclr"
"""Default project of wandb and experiment of MLflow."""


def make_loggers(config: Config, world: World) -> list[Callback]:
    """Return the loggers that --log names; none on ranks other than zero.

    Raises UserError if the package of one of them is not installed.
    """
    if not world.is_rank_zero:
        return []
    for name in config.loggers:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a folder of this name, such as wandb's ./wandb
            raise UserError(f"--log: got {name}, which is not installed; pip install 'fastsimclr[{name}]'")
    return [LOGGERS[name]() for name in config.loggers]


MEASURED = ("knn_accuracy", "probe_accuracy")  # between steps


class Logger(Callback, ABC):
    """Logs the metrics of each step and the measured accuracies. The packages are imported when the run starts."""

    def on_start(self, trainer: TrainerInterface) -> None:
        self.open(trainer)
        if trainer.progress.step == 0 and trainer.untrained_knn is not None:
            self.log({"knn_accuracy": trainer.untrained_knn}, 0)

    def on_step(self, trainer: TrainerInterface, record: dict[str, Any]) -> None:
        stages = {f"stages_ms/{name}": ms for name, ms in record["stages_ms"].items()}
        metrics = {name: value for name, value in record.items() if name not in ("step", "stages_ms")}
        self.log(metrics | stages, record["step"])

    def on_epoch(self, trainer: TrainerInterface, record: dict[str, Any]) -> None:
        if accuracies := {name: value for name, value in record.items() if name in MEASURED}:
            self.log(accuracies, record["step"])

    def on_end(self, trainer: TrainerInterface) -> None:
        self.close(failed=sys.exc_info()[0] is not None)  # the trainer calls this in a finally block

    @abstractmethod
    def open(self, trainer: TrainerInterface) -> None: ...

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def close(self, *, failed: bool) -> None: ...


class TensorBoardLogger(Logger):
    """Writes event files to tensorboard/ in the run's folder."""

    def __init__(self) -> None:
        self._writer: Any = None

    def open(self, trainer: TrainerInterface) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a resumed run repeats are purged.
        self._writer = SummaryWriter(str(trainer.folder.tensorboard), purge_step=trainer.progress.step + 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandbLogger(Logger):
    """Logs to a run of Weights & Biases in the project WANDB_PROJECT (default: fastsimclr), and resumes it.

    Its local files are in wandb/ in the run's folder.
    """

    def __init__(self) -> None:
        self._run: Any = None

    def open(self, trainer: TrainerInterface) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=trainer.folder.path.resolve().name,
                dir=trainer.folder.path,
                config=asdict(trainer.config),
                id=_previous_id("wandb", trainer),
                resume="allow",
            )
        except wandb.Error as error:
            raise _cannot_start("wandb", error, "run `wandb login`, or set WANDB_MODE=offline") from error
        write_text(trainer.folder.logger_id("wandb"), self._run.id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step >= self._run.step:  # steps that a resumed run repeats: wandb has them, and cannot replace them
            self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MlflowLogger(Logger):
    """Logs to a run of MLflow in the experiment MLFLOW_EXPERIMENT_NAME (default: fastsimclr), and resumes it.

    MLFLOW_TRACKING_URI selects the server or the store.
    """

    def __init__(self) -> None:
        self._mlflow: Any = None
        self._logged_step = -1

    def open(self, trainer: TrainerInterface) -> None:
        import mlflow

        self._mlflow = mlflow
        run_id = _previous_id("mlflow", trainer)
        try:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
            run = mlflow.start_run(run_id, run_name=trainer.folder.path.resolve().name)
            if run_id is None:
                mlflow.log_params(_flat(asdict(trainer.config)))  # MLflow cannot change them when a run resumes
            else:
                history = mlflow.MlflowClient().get_metric_history(run_id, "loss")
                self._logged_step = max((metric.step for metric in history), default=-1)
        except mlflow.MlflowException as error:
            raise _cannot_start("mlflow", error, "set MLFLOW_TRACKING_URI") from error
        write_text(trainer.folder.logger_id("mlflow"), run.info.run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "loss" in metrics and step <= self._logged_step:
            return  # a step that a resumed run repeats: MLflow has it, and cannot replace it
        self._mlflow.log_metrics(dict(metrics), step=step, synchronous=False)

    def close(self, *, failed: bool) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


LOGGERS: dict[str, type[Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}


def _previous_id(logger: str, trainer: TrainerInterface) -> str | None:
    """The logger's id of the run that the trainer resumes, or None."""
    file = trainer.folder.logger_id(logger)
    return file.read_text() if trainer.progress.step > 0 and file.exists() else None


def _cannot_start(logger: str, error: Exception, fix: str) -> UserError:
    return UserError(f"--log: got {logger}, which cannot start ({error}); {fix}, or leave it out")


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested options to names with dots: {"loss.temperature": 0.1}."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
