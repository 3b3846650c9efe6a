"""Check the metrics of a run, write them to metrics.jsonl, and show them."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastsimclr.errors import UserError
from fastsimclr.metrics_file import MetricsFile
from fastsimclr.progress_bar import LineTimer, Phase, duration, print_line
from fastsimclr.run_folder import RunFolder
from fastsimclr.training.heartbeat import Heartbeat


class Metrics:
    """The metrics of each step. Every rank checks them; rank zero writes them.

    on_step: called on every rank with the record of each step when it is complete.
    check: called before that; returns the error to raise after it, if the run is to end.
    complete: called before `check`; adds to the record what is computed on the CPU.
    """

    def __init__(
        self,
        on_step: Callable[[dict[str, Any]], None],
        check: Callable[[dict[str, Any]], UserError | None],
        complete: Callable[[dict[str, Any]], None],
    ) -> None:
        self.last: dict[str, Any] = {}
        """The record of the latest completed step."""
        self._on_step, self._check, self._add = on_step, check, complete
        self._lagged = LaggedRecord()
        self._log: RunLog | None = None

    def open(
        self, run: RunFolder, *, first_step: int, total_steps: int, epochs: int, is_epoch_finished: bool = True
    ) -> None:
        """Open the files. Only rank zero calls it.

        is_epoch_finished: False if the run will repeat what follows the last step of an epoch, which is `first_step`.
        """
        self._log = RunLog(
            run,
            first_step=first_step,
            total_steps=total_steps,
            epochs=epochs,
            is_epoch_finished=is_epoch_finished,
        )

    def show_first_step(self, estimated_seconds: float | None) -> None:
        """Show that the first step is running, until it is done: on a CPU it may take minutes."""
        if self._log is not None:
            self._log.show_first_step(estimated_seconds)

    def log(self, measured: dict[str, Tensor], stages: Callable[[], dict[str, float]], record: dict[str, Any]) -> None:
        """Add a step. measured: 0-dim tensors of one dtype and device; stages: from `StageClock.end_step`."""
        self._complete(self._lagged.push(measured, stages, record))

    def flush(self) -> None:
        """Wait for the device, and complete the record of the latest step."""
        self._complete(self._lagged.flush())

    def sync(self) -> None:
        """Complete the record of the latest step, and flush the file to disk, before a checkpoint is written."""
        self.flush()
        if self._log is not None:
            self._log.sync()

    def event(self, record: dict[str, Any]) -> None:
        """Write a record that does not belong to a step."""
        if self._log is not None:
            self._log.event(record)

    def end_epoch(self) -> None:
        """Complete the epoch's last record, and print a line where there is no progress bar."""
        self.flush()
        if self._log is not None:
            self._log.end_epoch(self.last)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _complete(self, record: dict[str, Any] | None) -> None:
        if record is None:
            return
        self._add(record)
        error = self._check(record)
        self.last = record
        if self._log is not None:
            self._log.step(record)
        self._on_step(record)
        if error is not None:
            raise error


class RunLog:
    """Writes records to metrics.jsonl, and shows the progress."""

    def __init__(
        self, run: RunFolder, *, first_step: int, total_steps: int, epochs: int, is_epoch_finished: bool = True
    ) -> None:
        self._file = MetricsFile(run, step=first_step, is_epoch_finished=is_epoch_finished)
        self._heartbeat = Heartbeat(self._file.write, first_step, total_steps)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            dynamic_ncols=True,
            disable=None,  # shown on a terminal only
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps{postfix}",
        )
        self._line_timer = LineTimer()
        self._speed: deque[tuple[float, int]] = deque(maxlen=20)
        self._contrastive = ""
        self._total_steps, self._epochs, self._first_step = total_steps, epochs, first_step
        self._phase = Phase("", show=None if self._bar.disable else self._bar.set_postfix_str)
        self._shown = ExitStack()

    def show_first_step(self, estimated_seconds: float | None) -> None:
        """Show the seconds that the first step has taken, until `step` is called."""
        self._shown.enter_context(self._phase)
        self._phase.restart(f"first step (about {duration(estimated_seconds)})" if estimated_seconds else "first step")

    def event(self, record: dict[str, Any]) -> None:
        """Write a record that does not belong to a step."""
        self._file.write(record)

    def sync(self) -> None:
        """Flush the file to disk."""
        self._file.sync()

    def step(self, record: dict[str, Any]) -> None:
        """Write a step's record, and show it: in the progress bar, or from time to time in a line."""
        if self._bar.disable:
            self._phase.restart(f"step {record['step'] + 1}/{self._total_steps}")
        else:
            self._shown.close()
        self._file.write(record)
        self._heartbeat.step = record["step"]
        if "contrastive_accuracy" in record:
            self._contrastive = f"contrastive accuracy {record['contrastive_accuracy']:.1%}, "
        self._speed.append((record["step_ms"] / 1000, record["images"]))
        self._bar.set_postfix_str(self._status(record), refresh=False)
        self._bar.update()
        if self._bar.disable and self._line_timer.is_due():
            self._print(record)

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Print a line unless there is a progress bar. record: of the epoch's last step."""
        if self._bar.disable:
            self._print(record)
            self._line_timer.restart()

    def close(self) -> None:
        self._shown.close()
        self._bar.close()
        self._heartbeat.close()
        self._file.close()

    def _print(self, record: dict[str, Any]) -> None:
        place = f"epoch {record['epoch'] + 1}/{self._epochs}, step {record['step']}/{self._total_steps}"
        print_line(f"{place}: {self._status(record)}")

    def _status(self, record: dict[str, Any]) -> str:
        """The loss, the latest contrastive accuracy, the speed over the last 20 steps, and the time left at that speed:
        kNN is not in it."""
        seconds, images = (sum(column) for column in zip(*self._speed, strict=True))
        left = seconds / len(self._speed) * (self._total_steps - record["step"])
        speed = f"lr {record['lr']:.3g}, {images / seconds:.0f} images/s, {duration(left)} left"
        return f"loss {record['loss']:.4f}, {self._contrastive}{speed}"


class LaggedRecord:
    """Completes the record of each step one step later, so that the host never waits for the GPU. On a CPU at once."""

    def __init__(self) -> None:
        self._pending: (
            tuple[Sequence[str], Tensor, torch.cuda.Event, Callable[[], dict[str, float]], dict[str, Any]] | None
        ) = None

    def push(
        self, measured: dict[str, Tensor], stages: Callable[[], dict[str, float]], record: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Add a step; return the record of the step before, which is now complete, or None.

        measured: 0-dim tensors of one dtype and device. stages: from `StageClock.end_step`, called before this.
        """
        names, values = tuple(measured), torch.stack(list(measured.values()))
        if values.device.type == "cpu":
            return _completed(names, values, stages, record)
        host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        completed = self.flush()
        self._pending = names, host, event, stages, record
        return completed

    def flush(self) -> dict[str, Any] | None:
        """Wait for the GPU and return the pending record, or None."""
        if self._pending is None:
            return None
        names, host, event, stages, record = self._pending
        event.synchronize()
        self._pending = None
        return _completed(names, host, stages, record)


def _completed(
    names: Sequence[str], values: Tensor, stages: Callable[[], dict[str, float]], record: dict[str, Any]
) -> dict[str, Any]:
    return record | dict(zip(names, values.tolist(), strict=True)) | {"stages_ms": stages()}
