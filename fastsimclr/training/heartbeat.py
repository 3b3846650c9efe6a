"""Signs of life in metrics.jsonl, which `fastsimclr doctor --run` reads."""

import threading
import time
from collections.abc import Callable
from typing import Any

from fastsimclr.profiling import peak_mib
from fastsimclr.progress_bar import current_phase

ENDED = "ended"
"""The phase of the last heartbeat, which a killed run does not write."""
SECONDS = 30.0


class Heartbeat:
    """Writes a record at once, every 30 s from a thread of its own, also while no step ends, and a last one on `close`.

    A record holds the time, in seconds since 1970, the last step that has ended, the last step of the run, the phase
    that the process is in, and its seconds so far. The last one also holds the peak memory of the process.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None], step: int, last_step: int) -> None:
        self.step = step
        self._write, self._last_step = write, last_step
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            self._beat(ENDED, 0.0, peak_mib=peak_mib())

    def _run(self) -> None:
        while True:
            self._beat(*(current_phase() or ("training", 0.0)))
            if self._closed.wait(SECONDS):
                return

    def _beat(self, phase: str, seconds: float, **more: float | None) -> None:
        record = {"step": self.step, "time": round(time.time(), 1), "phase": phase, "phase_seconds": round(seconds, 1)}
        self._write(record | {"last_step": self._last_step} | more)
