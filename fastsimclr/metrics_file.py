"""metrics.jsonl: reading it, where lines may be damaged, and writing it, where the disk may be full.

Each line is a JSON object with "step". Lines with "loss" are steps; the others are events between steps.
"""

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsimclr.progress_bar import print_line
from fastsimclr.run_folder import RunFolder, replace_atomically

_NUMBERS = (
    *("epoch", "loss", "lr", "images_per_second", "data_wait", "step_ms", "images"),
    *("knn_accuracy", "probe_accuracy", "probe_loss", "skipped_images"),
    *("contrastive_accuracy", "alignment", "uniformity", "effective_rank_h", "effective_rank_z"),
    *("mean_norm_h", "dead_dimensions_h"),
)

_NULL_IF_NOT_FINITE = ("loss", "gradient_norm", "probe_loss")  # JSON has no NaN


def read_lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line with its record; None for a damaged line.

    A power cut leaves zeros, and a kill or a full disk a part of a line. Raises OSError if the file cannot be read.
    """
    with open(file, "rb") as lines:
        for line in lines:
            yield line, parse_record(line)


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of all lines that are not damaged."""
    return (record for _, record in read_lines(file) if record is not None)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line with its line break; None for a damaged line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    if "knn_accuracy" in record and "epoch" not in record:
        return None
    for name in _NULL_IF_NOT_FINITE:
        if record.get(name, 0) is None:
            record[name] = math.nan
    stages = record.get("stages_ms", {})
    numbers = [record.get(name, 0) for name in _NUMBERS]
    numbers += stages.values() if isinstance(stages, dict) else [None]
    return record if all(isinstance(number, int | float) for number in numbers) else None


class MetricsFile:
    """metrics.jsonl, open for writing, by several threads.

    If a line cannot be written, as on a full disk, it is kept in memory and written with a later one.
    """

    def __init__(self, run: RunFolder, *, step: int, is_epoch_finished: bool) -> None:
        """Open the file after `step` steps. Drops the records that the run will repeat; see `_is_kept`."""
        self._path = run.metrics
        _repair(run, step, is_epoch_finished)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._lock = threading.Lock()
        self._pending = bytearray()
        self._has_warned = False

    def write(self, record: dict[str, Any]) -> None:
        """Append a line. Warns once, instead of raising, if that fails."""
        null = {name: None for name in _NULL_IF_NOT_FINITE if not math.isfinite(record.get(name, 0))}
        with self._lock:
            self._pending += json.dumps(record | null).encode() + b"\n"
            try:
                while self._pending:
                    del self._pending[: os.write(self._descriptor, self._pending)]
                return
            except OSError as error:
                reason = error.strerror
            has_warned, self._has_warned = self._has_warned, True
        if not has_warned:
            print_line(f"warning: {self._path} cannot be written ({reason}); its lines are kept in memory")

    def sync(self) -> None:
        """Flush the file to disk, so that after a power cut it has all steps of a checkpoint that is written next."""
        with contextlib.suppress(OSError):  # such as EINVAL of a pipe; `write` warns of a full disk
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
        if unwritten := self._pending.count(b"\n"):
            print_line(f"warning: the last {unwritten} lines of {self._path} could not be written")


def _repair(run: RunFolder, step: int, is_epoch_finished: bool) -> None:
    """Drop what a run that resumes after `step` steps will repeat, and move damaged lines to another file."""
    if not run.metrics.exists():
        run.metrics.parent.mkdir(parents=True, exist_ok=True)
        return
    kept: list[bytes] = []
    damaged: list[bytes] = []
    position = kept_end = 0
    for line, record in read_lines(run.metrics):
        position += len(line)
        if record is None:
            damaged.append(line.removesuffix(b"\n") + b"\n")
        elif step > 0 and _is_kept(record, step, is_epoch_finished):
            kept.append(line)
            kept_end = position
    if damaged:
        with open(run.damaged_metrics, "ab") as file:
            file.writelines(damaged)
        print_line(f"warning: {len(damaged)} damaged lines of {run.metrics} were moved to {run.damaged_metrics.name}")
    if sum(map(len, kept)) == kept_end:
        os.truncate(run.metrics, kept_end)  # needs no space, unlike a copy
        return
    with replace_atomically(run.metrics) as partial:
        partial.write_bytes(b"".join(kept))


def _is_kept(record: dict[str, Any], step: int, is_epoch_finished: bool) -> bool:
    """Whether a record precedes `step`; at `step`, an event of an unfinished epoch will be repeated."""
    is_repeated = record["step"] == step and "loss" not in record and not is_epoch_finished
    return bool(record["step"] <= step) and not is_repeated
