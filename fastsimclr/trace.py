"""`train --profile`: a torch.profiler trace of some steps, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

FIRST, STEPS = 6, 20
"""The first step that is traced, counted from this start, and how many: before it cuDNN still tries algorithms."""


class Trace:
    """Traces steps FIRST to FIRST + STEPS - 1 into `file`, a .json.gz; fewer where the run ends before."""

    def __init__(self, file: Path, device: torch.device) -> None:
        self.file = file
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=FIRST - 2, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            acc_events=True,  # else it warns that a new cycle clears them, and there is no other
        )
        self.is_written = False
        self._profile.start()

    def end_step(self) -> None:
        """A step is done."""
        self._profile.step()

    def close(self) -> None:
        """The run ends here: write what there is, if that has not been done."""
        self._profile.stop()

    def _write(self, made: profile) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        made.export_chrome_trace(str(self.file))
        self.is_written = True
