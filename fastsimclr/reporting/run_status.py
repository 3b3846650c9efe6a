"""What a run is doing, as its folder tells: `fastsimclr doctor --run`."""

import time
from dataclasses import dataclass
from typing import Any

from fastsimclr.errors import UserError
from fastsimclr.metrics_file import parse_record
from fastsimclr.progress_bar import duration
from fastsimclr.run_folder import RunFolder

_RECENT_STEPS = 20
_SILENT_SECONDS = 100.0
"""A living run writes a heartbeat every 30 s; a busy machine or a slow file system may delay it."""


@dataclass(frozen=True)
class RunStatus:
    """The state of a run. Ages are in seconds."""

    run: str
    state: str
    """running; finished: all steps are done; stopped: it has ended before; silent: it was probably killed."""
    heartbeat_age: float
    step: int
    """The last step that has ended."""
    last_step: int
    phase: str
    phase_seconds: float
    """Seconds from the start of the phase to the heartbeat."""
    step_ms: float | None
    """Mean of the last 20 steps. None before the first, like the other figures of steps."""
    images_per_second: float | None
    loss: float | None
    checkpoint_age: float | None
    """None without a checkpoint."""
    skipped_images: int

    @property
    def is_well(self) -> bool:
        return self.state in ("running", "finished")

    def describe(self) -> str:
        """Return the lines to print."""
        ago = f"{duration(max(self.heartbeat_age, 0))} ago"
        state = {
            "running": f"running: last heartbeat {ago}",
            "finished": f"finished {ago}",
            "stopped": f"stopped {ago}; rerun the same command to resume",
            "silent": f"not running: last heartbeat {ago}; it was probably killed, rerun the same command to resume",
        }
        rows = {"run": self.run, "state": state[self.state], "step": f"{self.step:,} of {self.last_step:,}"}
        if self.state in ("running", "silent"):
            rows["phase"] = f"{self.phase}, for {duration(self.phase_seconds)} at the last heartbeat"
        if self.step_ms is not None:
            rows["speed"] = f"{self.step_ms:.0f} ms per step, {self.images_per_second:.0f} images/s"
            rows["loss"] = f"{self.loss:.4f}"
            if self.state == "running":
                rows["speed"] += f", {duration((self.last_step - self.step) * self.step_ms / 1000)} left"
        rows["checkpoint"] = "none yet" if self.checkpoint_age is None else f"{duration(self.checkpoint_age)} old"
        rows["skipped"] = f"{self.skipped_images:,} images"
        return "\n".join(f"{name:12}{text}" for name, text in rows.items())


def read_status(folder: RunFolder) -> RunStatus:
    """Read the state of a run. Raises UserError if the folder is not that of a run."""
    try:
        lines = folder.metrics.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(
            f"--run: got {folder}, whose metrics.jsonl cannot be read ({error.strerror}); expected the --output of "
            "train, which writes it when the images are open"
        ) from error
    now = time.time()
    heartbeat = _last(lines, b'"phase"', 1)
    if not heartbeat:
        raise UserError(f"--run: got {folder}, whose metrics.jsonl has no heartbeat; expected a run of this version")
    beat = heartbeat[0]
    steps = _last(lines, b'"loss"', _RECENT_STEPS)
    skipped = _last(lines, b'"skipped_images"', 1)
    step = max([beat["step"], *(record["step"] for record in steps)])
    seconds = sum(record["step_ms"] for record in steps) / 1000
    return RunStatus(
        run=str(folder),
        state=_state(beat, step, now),
        heartbeat_age=now - beat["time"],
        step=step,
        last_step=beat["last_step"],
        phase=beat["phase"],
        phase_seconds=beat["phase_seconds"],
        step_ms=1000 * seconds / len(steps) if steps else None,
        images_per_second=sum(record["images"] for record in steps) / seconds if steps else None,
        loss=steps[0]["loss"] if steps else None,
        checkpoint_age=now - folder.checkpoint.stat().st_mtime if folder.checkpoint.exists() else None,
        skipped_images=skipped[0]["skipped_images"] if skipped else 0,
    )


def _state(beat: dict[str, Any], step: int, now: float) -> str:
    if beat["phase"] == "ended":
        return "finished" if step >= beat["last_step"] else "stopped"
    return "running" if now - beat["time"] < _SILENT_SECONDS else "silent"


def _last(lines: list[bytes], key: bytes, count: int) -> list[dict[str, Any]]:
    """Return the last `count` records with this key, the latest first. Damaged lines are passed over."""
    found: list[dict[str, Any]] = []
    for line in reversed(lines):
        if key in line and (record := parse_record(line)) is not None:
            found.append(record)
            if len(found) == count:
                break
    return found
