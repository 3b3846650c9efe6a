"""The metrics of a run: checked, and written to metrics.jsonl, TensorBoard and a progress bar or lines."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastsimclr.errors import UserError
from fastsimclr.run_folder import RunFolder, replace_atomically


class Metrics:
    """The metrics of each step, which every rank checks and the first rank writes."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        """The record of the latest step that is complete."""
        self._lagged = LaggedRecord()
        self._log: RunLog | None = None

    def open(self, run: RunFolder, *, first_step: int, total_steps: int, epochs: int) -> None:
        """Begin to write: for the first rank."""
        self._log = RunLog(run, first_step=first_step, total_steps=total_steps, epochs=epochs)

    def log(self, measured: dict[str, Tensor], stages: Callable[[], dict[str, float]], record: dict[str, Any]) -> None:
        """Add a step. measured: 0-dim tensors of one dtype and device; stages: as of `StageClock.end_step`."""
        self._complete(self._lagged.push(measured, stages, record))

    def flush(self) -> None:
        """Wait for the device, and complete the latest step's record."""
        self._complete(self._lagged.flush())

    def event(self, record: dict[str, Any]) -> None:
        """Write a line that is not a step's."""
        if self._log is not None:
            self._log.write(record)

    def end_epoch(self, epochs_done: int) -> None:
        """Complete the epoch's last record, and print a line where there is no progress bar."""
        self.flush()
        if self._log is not None:
            self._log.epoch(epochs_done, self.last)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _complete(self, record: dict[str, Any] | None) -> None:
        if record is None:
            return
        step, lr = record["step"], record["lr"]
        if not math.isfinite(record["loss"]):
            raise UserError(
                f"loss: got {record['loss']} at step {step} (lr {lr:.4g}); expected a finite one: lower --optim.lr or "
                "use --precision fp32. The latest checkpoint, if any, is from before this step"
            )
        if record.get("grad_scale", 1.0) < 1.0:
            raise UserError(
                f"grad_scale: got {record['grad_scale']:.4g} at step {step} (lr {lr:.4g}); expected at least 1: "
                "gradients overflow float16 even unscaled; lower --optim.lr or use --precision fp32"
            )
        self.last = record
        if self._log is not None:
            self._log.step(record)


class RunLog:
    """Writes one JSON object per line to metrics.jsonl, the same to TensorBoard, and shows the progress."""

    def __init__(self, run: RunFolder, *, first_step: int, total_steps: int, epochs: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import: not for the other ranks

        self._path = run.metrics
        self._drop_lines_after(first_step)
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115 - open as long as the run
        self._board = SummaryWriter(str(run.tensorboard), purge_step=first_step + 1)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=None)
        self._speed: deque[tuple[float, int]] = deque(maxlen=20)
        self._total_steps, self._epochs = total_steps, epochs
        self._started, self._first_step = time.monotonic(), first_step

    def step(self, record: dict[str, Any]) -> None:
        """Write a step's record."""
        self.write(record)
        self._speed.append((record["step_ms"] / 1000, record["images"]))
        rate = sum(i for _, i in self._speed) / sum(s for s, _ in self._speed)
        self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {rate:.0f} images/s", refresh=False)
        self._bar.update()

    def epoch(self, epoch: int, record: dict[str, Any]) -> None:
        """Print a line after so many epochs, unless there is a progress bar. record: of the last step."""
        if not self._bar.disable:
            return
        seconds = sum(s for s, _ in self._speed)
        rate = sum(i for _, i in self._speed) / seconds if seconds else 0.0
        done = record["step"] - self._first_step
        left = (time.monotonic() - self._started) / max(1, done) * (self._total_steps - record["step"])
        print(
            f"epoch {epoch}/{self._epochs}  step {record['step']}/{self._total_steps}  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.3g}  {rate:.0f} images/s  {left / 60:.1f} min left",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._board.close()

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        stages = {f"stages_ms/{name}": ms for name, ms in record.get("stages_ms", {}).items()}
        for name, value in (record | stages).items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, record["step"])

    def _drop_lines_after(self, step: int) -> None:
        """Drop what a killed run wrote about steps that will now be repeated; its last line may be torn."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines(keepends=True):
            if line.endswith("\n") and json.loads(line)["step"] <= step and step > 0:
                kept.append(line)
        with replace_atomically(self._path) as partial:
            partial.write_text("".join(kept))


class LaggedRecord:
    """Completes each step's record one step later, so that the host never waits for the GPU. On a CPU at once."""

    def __init__(self) -> None:
        self._pending: (
            tuple[Sequence[str], Tensor, torch.cuda.Event, Callable[[], dict[str, float]], dict[str, Any]] | None
        ) = None

    def push(
        self, measured: dict[str, Tensor], stages: Callable[[], dict[str, float]], record: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Take what this step measured (0-dim tensors of one dtype and device), its stages (call
        `StageClock.end_step` before) and its record; return the earlier record that is now complete, if any."""
        names, values = tuple(measured), torch.stack(list(measured.values()))
        if values.device.type == "cpu":
            return _completed(names, values, stages, record)
        host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        done = self.flush()
        self._pending = names, host, event, stages, record
        return done

    def flush(self) -> dict[str, Any] | None:
        """Return the record that is still incomplete, if any, once the GPU has done its step."""
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
