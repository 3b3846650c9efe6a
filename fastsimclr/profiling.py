"""Time the stages of a training step, and trace some steps for `train --profile`.

Stages are timed on the device, without synchronizing with it. A step is divided into consecutive intervals: entering a
stage starts an interval of that stage, leaving it starts one of the enclosing stage. The intervals of a step therefore
add up to the step, and the time of a nested stage is not part of the enclosing one. On a GPU the boundaries are CUDA
events in the stream, which are read when the step's loss has arrived. They record the time at which the *GPU* reaches
them: "data_wait" is the time that the GPU is idle, not the time that Python waits.

    with stage("forward"):      # anywhere in the training loop; does nothing unless a clock is `running`
        z = model(images)
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

OTHER = "other"
"""The stage of everything outside the other stages."""
FIRST_TRACED, TRACED_STEPS = 6, 20
"""First traced step, counted from the start of the process, and number of traced steps. In the steps before it cuDNN
benchmarks algorithms."""

_running: "StageClock | None" = None


def stage(name: str) -> AbstractContextManager[object]:
    """Return a context manager that times its block as stage `name`, if a clock is running."""
    return nullcontext() if _running is None else _running.stage(name)


class StageClock:
    """Times the stages of steps on one device. The first step starts when the clock is created."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open_stages = [OTHER]
        self._boundaries = [(OTHER, self._now())]
        self._started = time.perf_counter()

    def restart(self) -> None:
        """Restart the current step: the time since the end of the last one is not counted."""
        self._boundaries = [(OTHER, self._now())]
        self._started = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Use this clock for every `stage` in the block."""
        global _running
        previous, _running = _running, self
        try:
            yield
        finally:
            _running = previous

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._open_stages.append(name)
        self._mark_boundary()
        try:
            with record_function(f"stage: {name}"):  # the label in a profiler trace
                yield
        finally:
            self._open_stages.pop()
            self._mark_boundary()

    def end_step(self) -> tuple[float, Callable[[], dict[str, float]]]:
        """End this step and start the next. Returns the step's seconds on the host, and a function that returns the
        milliseconds of each stage. Call it after the device has finished all work queued before this call."""
        self._mark_boundary()
        boundaries, self._boundaries = self._boundaries, self._boundaries[-1:]
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        return seconds, lambda: _milliseconds(boundaries)

    def _mark_boundary(self) -> None:
        self._boundaries.append((self._open_stages[-1], self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _milliseconds(boundaries: "list[tuple[str, float | torch.cuda.Event]]") -> dict[str, float]:
    stages: dict[str, float] = {}
    for (name, start), (_, end) in itertools.pairwise(boundaries):
        if isinstance(start, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event)
            elapsed_ms = start.elapsed_time(end)
        else:
            assert isinstance(end, float)
            elapsed_ms = 1000 * (end - start)
        stages[name] = stages.get(name, 0.0) + elapsed_ms
    rest = stages.pop(OTHER)
    return {name: round(ms, 4) for name, ms in {**stages, OTHER: rest}.items()}


def peak_mib() -> float | None:
    """Return the peak memory so far: PyTorch's allocator on the GPU that this process uses, else the resident memory of
    this process, without its workers. None if the system does not report it."""
    if torch.cuda.is_initialized():  # any GPU: a thread does not know the current one of another
        return max(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count())) / 2**20
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # getrusage's ru_maxrss may be that of the process that started this one
                return int(line.split()[1]) / 1024
    return None


class Trace:
    """Traces TRACED_STEPS steps from step FIRST_TRACED on with torch.profiler; fewer if the run ends earlier.

    Writes `file` (.json.gz) for Perfetto (ui.perfetto.dev) or chrome://tracing.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self.file = file
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=FIRST_TRACED - 2, warmup=1, active=TRACED_STEPS, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            acc_events=True,  # avoids the warning that a new cycle clears events; there is only one cycle
        )
        self.is_written = False
        self._profile.start()

    def end_step(self) -> None:
        """Mark the end of a step."""
        self._profile.step()

    def close(self) -> None:
        """Stop tracing, and write the trace if it has not been written."""
        self._profile.stop()

    def _write(self, profiler: profile) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.file))
        self.is_written = True
