"""Callbacks: code that a run calls at its start, after steps, epochs and checkpoints, and at its end."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from fastsimclr.config import Config
from fastsimclr.distributed import World, raise_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.progress_bar import print_line
from fastsimclr.run_folder import RunFolder
from fastsimclr.training.progress import Progress


class TrainerInterface(Protocol):
    """The parts of `Trainer` that callbacks may use."""

    config: Config
    world: World
    """This rank, the number of ranks, and the device."""
    folder: RunFolder
    """The run's folder; the same on all ranks."""
    model: nn.Module
    """The `SimCLR` module: `model.encoder` and `model.projector`. With --distributed fsdp, its weights are sharded: use
    `encoder()` to evaluate it."""
    progress: Progress
    """Finished steps (`step`) and epochs (`epoch`), and whether the run is complete (`is_done`)."""
    measures_knn: bool
    """Whether the run measures kNN accuracy: `knn_every` is not 0, and the images have labels."""
    untrained_knn: float | None
    """kNN accuracy before the first step, a fraction; None if not measured."""

    @property
    def saved_step(self) -> int:
        """Finished steps in the newest checkpoint of this run; 0 if there is none."""

    def encoder(self) -> nn.Module:
        """Return the encoder: that of `model`, or, with --distributed fsdp, a whole copy. All ranks must call it.

        Its buffers, such as running statistics, are those of rank zero, which the checkpoint has.
        """

    def stop(self) -> None:
        """End the run on all ranks before the next step, with a checkpoint. One rank's call is enough."""

    def request_checkpoint(self) -> None:
        """Save a checkpoint after the current step even if none is due. All ranks must call it."""


class Callback:
    """Base class of callbacks. Override the methods you need; the others do nothing.

    All ranks call every method in the same order, and with the same record except for the times of each rank, so a
    callback may use collective operations; write files on rank zero only (`trainer.world.is_rank_zero`).

    If a method raises an exception on any rank, the run ends on all ranks before the next step: it saves a checkpoint,
    and the exception propagates on the lowest rank that raised one. Until then the callbacks are still called, because
    other ranks may wait for this one in a collective operation.
    """

    def on_start(self, trainer: TrainerInterface) -> None:
        """Called once before the first step of this process, after resuming and after `--knn_at_start`.

        An exception ends the run at once, without a checkpoint.
        """

    def on_step(self, trainer: TrainerInterface, record: dict[str, Any]) -> None:
        """Called after each step with its record, the object that is written to metrics.jsonl.

        On a GPU a record is complete when the next step has been queued, so that training never waits for the GPU:
        `record["step"]` is then one less than `trainer.progress.step`, except at the end of an epoch or a checkpoint.
        """

    def on_epoch(self, trainer: TrainerInterface, record: dict[str, Any]) -> None:
        """Called after each epoch and after the last step of the run, before the checkpoint of that step.

        record: that of the epoch's last step, with "knn_accuracy" (a fraction) if it was measured after this epoch.
        """

    def on_checkpoint(self, trainer: TrainerInterface, path: Path) -> None:
        """Called before a step, or at the end of an epoch or of the run, once a checkpoint is complete. path: the file.

        Checkpoints are written in the background: it holds `trainer.saved_step` finished steps, which may be fewer than
        `trainer.progress.step`. Not called for a checkpoint that could not be written.
        """

    def on_end(self, trainer: TrainerInterface) -> None:
        """Called last, in reverse order of the callbacks, if `on_start` returned. Close files here.

        Also called after an error, which other ranks may not have: do not use collective operations.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, for the checkpoint: tensors, numbers, strings and containers of them.

        The checkpoint stores the state of rank zero.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from the checkpoint that the run resumes from. Called before `on_start`, on all ranks."""


class Callbacks:
    """The callbacks of a trainer, called in order. An exception stops the run; `raise_failure` then raises it."""

    def __init__(self, trainer: TrainerInterface, callbacks: Sequence[Callback]) -> None:
        self._trainer = trainer
        self._callbacks = list(callbacks)
        self._started: list[Callback] = []
        self._failure: Exception | None = None
        self._failed = ""

    def on_start(self) -> None:
        def start(callback: Callback) -> None:
            callback.on_start(self._trainer)
            self._started.append(callback)

        self._each(start)

    def on_step(self, record: dict[str, Any]) -> None:
        self._each(lambda callback: callback.on_step(self._trainer, record))

    def on_epoch(self, record: dict[str, Any]) -> None:
        self._each(lambda callback: callback.on_epoch(self._trainer, record))

    def on_checkpoint(self, path: Path) -> None:
        self._each(lambda callback: callback.on_checkpoint(self._trainer, path))

    def on_end(self) -> None:
        """Call on_end of the callbacks that have started, and raise the first exception of these calls."""
        failures = []
        while self._started:
            try:
                self._started.pop().on_end(self._trainer)
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def raise_failure(self) -> None:
        """Raise on all ranks if a callback has raised on any. All ranks must call it."""
        world = self._trainer.world
        try:
            raise_on_all_ranks(self._failure, world)
        except Exception as error:
            if error is self._failure and not isinstance(error, UserError):
                print_line(f"rank {world.rank}: callback {self._failed} raised; the run ends on all ranks")
            raise

    def state_dict(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the class name and state of each callback that has one."""
        states: list[tuple[str, dict[str, Any]]] = []

        def add(callback: Callback) -> None:
            name, state = type(callback).__name__, callback.state_dict()
            if not _is_plain(state):
                raise UserError(f"{name}.state_dict: got {state}, expected tensors, numbers, strings and containers")
            if state:
                states.append((name, state))

        self._each(add)
        return states

    def load_state_dict(self, states: list[tuple[str, dict[str, Any]]]) -> None:
        """Restore the states, by class; those of one class in order. Callbacks that are new in this run have none."""
        states = list(states)
        for callback in self._callbacks:
            saved = next((saved for saved in states if saved[0] == type(callback).__name__), None)
            if saved is not None:
                states.remove(saved)
                callback.load_state_dict(saved[1])

    def _each(self, call: Callable[[Callback], None]) -> None:
        for callback in self._callbacks:
            try:
                call(callback)
            except Exception as error:
                if self._failure is None:
                    self._failure, self._failed = error, type(callback).__name__
                self._trainer.stop()


def _is_plain(value: Any) -> bool:
    """Return whether `load_checkpoint`, which never runs code from the file, can load this value."""
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, Tensor) or type(value) in (int, float, bool, str, type(None))  # not NumPy's floats


class EarlyStopping(Callback):
    """Stop the run when a metric has not improved for some epochs.

    metric: "knn_accuracy", looked at when it is measured (`--knn_every`), or "loss", the mean over an epoch.
    patience: number of epochs without an improvement after which the run stops.
    min_delta: smallest change of the metric that counts as an improvement.
    A stopped run that is started again stops before its first step, unless patience is larger.
    """

    STATE = ("best", "best_epoch", "last_epoch", "loss_sum", "loss_steps")

    def __init__(
        self, metric: Literal["knn_accuracy", "loss"] = "knn_accuracy", patience: int = 10, min_delta: float = 0.0
    ) -> None:
        if metric not in ("knn_accuracy", "loss"):
            raise UserError(f"metric: got {metric!r}, expected 'knn_accuracy' or 'loss'")
        if patience < 1 or min_delta < 0:
            raise UserError(
                f"patience, min_delta: got {patience} and {min_delta}, expected at least one epoch and at least 0"
            )
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self.best: float | None = None
        """Best value so far."""
        self.best_epoch = 0
        """Epochs done when the best value was measured."""
        self.last_epoch = 0
        self.loss_sum, self.loss_steps = 0.0, 0

    def on_start(self, trainer: TrainerInterface) -> None:
        if self.metric == "knn_accuracy":
            check_measures_knn("EarlyStopping", trainer)
        self._stop_if_due(trainer)

    def on_step(self, trainer: TrainerInterface, record: dict[str, Any]) -> None:
        self.loss_sum += record["loss"]
        self.loss_steps += 1

    def on_epoch(self, trainer: TrainerInterface, record: dict[str, Any]) -> None:
        value, sign = record.get("knn_accuracy"), 1
        if self.metric == "loss":
            value, sign = self.loss_sum / self.loss_steps, -1
        self.loss_sum, self.loss_steps = 0.0, 0
        if value is None:
            return
        self.last_epoch = record["epoch"] + 1
        if self.best is None or sign * (value - self.best) > self.min_delta:
            self.best, self.best_epoch = value, self.last_epoch
        self._stop_if_due(trainer)

    def _stop_if_due(self, trainer: TrainerInterface) -> None:
        without = self.last_epoch - self.best_epoch
        if without < self.patience:
            return
        trainer.stop()
        if trainer.world.is_rank_zero:
            best = f"the best was {self.best:.4g} after epoch {self.best_epoch}"
            print(f"EarlyStopping: {self.metric} has not improved for {without} epochs; {best}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state[name])


class KeepCheckpoints(Callback):
    """Keep checkpoints that later ones would replace: the options `--keep_every` and `--keep_best`.

    every: keep the checkpoint of every N-th epoch as checkpoints/epoch-0010.pt; None keeps none.
    best: "knn" keeps the checkpoint of the highest kNN accuracy as checkpoints/best.pt, the first one if several are
        equal; None keeps none.
    They are hard links, or copies where the file system has no links. If a file cannot be kept, rank zero prints why,
    and the run continues.
    """

    def __init__(self, every: int | None = None, best: Literal["knn"] | None = None) -> None:
        self.every, self.best = every, best
        self.best_accuracy = 0.0
        """Highest kNN accuracy so far, a fraction."""
        self.best_epoch = 0
        """Epochs done when it was measured; 0 if it has not been."""
        self._due: list[Path] = []
        self._due_step = 0  # of the checkpoint to keep as them

    def on_start(self, trainer: TrainerInterface) -> None:
        if self.best == "knn":
            check_measures_knn("--keep_best", trainer)

    def on_epoch(self, trainer: TrainerInterface, record: dict[str, Any]) -> None:
        self._due, self._due_step = [], trainer.progress.step  # earlier ones could not be written
        epochs_done = trainer.progress.epoch
        is_complete = record["epoch"] < epochs_done  # max_steps may end the run within an epoch
        if self.every is not None and is_complete and epochs_done % self.every == 0:
            self._due.append(trainer.folder.epoch_checkpoint(epochs_done))
        accuracy = record.get("knn_accuracy", -1.0)
        if self.best == "knn" and accuracy > self.best_accuracy:
            self.best_accuracy, self.best_epoch = accuracy, record["epoch"] + 1
            self._due.append(trainer.folder.best_checkpoint)
        if self._due:
            trainer.request_checkpoint()

    def on_checkpoint(self, trainer: TrainerInterface, path: Path) -> None:
        if not trainer.world.is_rank_zero or trainer.saved_step != self._due_step:
            return
        for kept in self._due:
            try:
                trainer.folder.keep(path, kept)
            except OSError as error:
                print_line(f"{kept}: not kept ({error.strerror}); the run continues")

    def state_dict(self) -> dict[str, Any]:
        return {"best_accuracy": self.best_accuracy, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_accuracy, self.best_epoch = state["best_accuracy"], state["best_epoch"]


def check_measures_knn(name: str, trainer: TrainerInterface) -> None:
    """Raise UserError if the run does not measure the kNN accuracy that `name` needs."""
    if not trainer.measures_knn:
        raise UserError(
            f"{name}: got a run that does not measure kNN accuracy; expected images with labels and --knn_every of "
            "at least 1"
        )
