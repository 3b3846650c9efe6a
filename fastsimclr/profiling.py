"""Where a step's time goes: its stages, and a trace of some steps for `train --profile`.

Stages are timed by the device's own clock, without ever waiting for the device. A step is cut into consecutive pieces:
entering a stage begins a piece of it, leaving it one of the stage around it. So the pieces of a step add up to the
step, and a stage within a stage counts for itself alone. On a GPU a cut is an event in the stream, read when the step's
loss has arrived anyway. It gives the time at which the *GPU* got there: "data_wait" is how long the GPU had nothing to
do, not how long Python waited.

    with stage("forward"):      # anywhere below the loop; costs nothing unless a clock is `running`
        z = model(images)
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

OTHER = "other"
"""The stage of whatever is in no other."""
FIRST_TRACED, TRACED_STEPS = 6, 20
"""The first step that is traced, counted from this start, and how many: before it cuDNN still tries algorithms."""

_running: "StageClock | None" = None


def stage(name: str) -> AbstractContextManager[object]:
    """What is done within counts as stage `name` of the step of the clock that is running, if one is."""
    return nullcontext() if _running is None else _running.stage(name)


class StageClock:
    """Cuts steps into stages on one device, from its making on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inside = [OTHER]
        self._cuts = [(OTHER, self._now())]
        self._started = time.perf_counter()

    def restart(self) -> None:
        """Begin the step again: the time since the end of the last one belongs to no step."""
        self._cuts = [(OTHER, self._now())]
        self._started = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """This is the clock of every `stage` within."""
        global _running
        before, _running = _running, self
        try:
            yield
        finally:
            _running = before

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._inside.append(name)
        self._cut()
        try:
            with record_function(f"stage: {name}"):  # in a profiler's trace
                yield
        finally:
            self._inside.pop()
            self._cut()

    def end_step(self) -> tuple[float, Callable[[], dict[str, float]]]:
        """End this step and begin the next. Returns the seconds that it took here on the host, and a function that
        gives the milliseconds of each stage once the device has done all that was queued before this call."""
        self._cut()
        cuts, self._cuts = self._cuts, self._cuts[-1:]
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        return seconds, lambda: _milliseconds(cuts)

    def _cut(self) -> None:
        self._cuts.append((self._inside[-1], self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _milliseconds(cuts: "list[tuple[str, float | torch.cuda.Event]]") -> dict[str, float]:
    stages: dict[str, float] = {}
    for (name, start), (_, end) in itertools.pairwise(cuts):
        if isinstance(start, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event)
            passed = start.elapsed_time(end)
        else:
            assert isinstance(end, float)
            passed = 1000 * (end - start)
        stages[name] = stages.get(name, 0.0) + passed
    rest = stages.pop(OTHER)
    return {name: round(ms, 4) for name, ms in {**stages, OTHER: rest}.items()}


class Trace:
    """Traces TRACED_STEPS steps from FIRST_TRACED on into `file`, a .json.gz; fewer where the run ends before.

    By torch.profiler, for Perfetto (ui.perfetto.dev) or chrome://tracing.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self.file = file
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=FIRST_TRACED - 2, warmup=1, active=TRACED_STEPS, repeat=1),
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
