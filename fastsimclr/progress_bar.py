"""Progress of long tasks on standard error: a tqdm bar on a terminal, plain lines elsewhere."""

import itertools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

FIRST_LINE_SECONDS = 5.0
LINE_SECONDS = 30.0
POLL_SECONDS = 1.0
_MAX_IDLE_POLLS = 10  # without a visible phase, before the thread that reports them ends; a run has one in each step


class LineTimer:
    """Tells when the next line is due: 5 s after the start, then every 30 s."""

    def __init__(self) -> None:
        self._next = time.monotonic() + FIRST_LINE_SECONDS

    def is_due(self) -> bool:
        """Whether to print a line now. If so, the next one is due 30 s later."""
        due = time.monotonic() >= self._next
        if due:
            self.restart()
        return due

    def restart(self) -> None:
        """Make the next line due in 30 s."""
        self._next = time.monotonic() + LINE_SECONDS


class PlainProgress:
    """Prints lines, in place of a tqdm bar, where there is no terminal."""

    def __init__(self, total: int, title: str, unit: str) -> None:
        self._total, self._title, self._unit = total, title, unit
        self._done, self._postfix = 0, ""
        self._started, self._timer = time.monotonic(), LineTimer()

    def update(self, n: int = 1) -> None:
        self._done += n
        if self._done and self._timer.is_due():
            left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
            note = f", {self._postfix}" if self._postfix else ""
            print_line(f"{self._title}: {self._done:,} of {self._total:,} {self._unit}s{note}, {duration(left)} left")

    def set_postfix_str(self, text: str) -> None:
        self._postfix = text

    def close(self) -> None:
        pass


def progress_bar(total: int, title: str, unit: str, *, visible: bool = True, delay: float = 0.0) -> Any:
    """A tqdm bar for `total` units of work, or PlainProgress if standard error is not a terminal.

    visible: False on ranks other than zero. delay: seconds before the bar appears on a terminal.
    """
    if visible and not sys.stderr.isatty():
        return PlainProgress(total, title, unit)
    from tqdm import tqdm  # here, so that `import fastsimclr` needs only PyTorch and torchvision

    return tqdm(total=total, desc=title, unit=unit, delay=delay, leave=None, dynamic_ncols=True, disable=not visible)


def print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
    Phase.last_line = time.monotonic()


class Phase:
    """A part of a program that may take long, named in a line while no other line appears: 5 s after its start, and
    whenever 30 s have passed without a line.

    A context; within an inner one, only that is named. `current_phase` also returns those that are not visible.
    """

    last_line: ClassVar[float] = 0.0
    """Time of the latest line of `print_line`."""
    _entered: ClassVar[list["Phase"]] = []
    _is_reporting: ClassVar[bool] = False
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, title: str, *, visible: bool = True, show: Callable[[str], None] | None = None) -> None:
        """visible: False on ranks other than zero. show: called with the text every second, instead of lines."""
        self._title, self._visible, self._show = title, visible, show
        self._started = time.monotonic()

    def restart(self, title: str) -> None:
        """Begin another part."""
        self._title, self._started = title, time.monotonic()

    def __enter__(self) -> "Phase":
        self.restart(self._title)
        with self._lock:
            self._entered.append(self)
            if self._visible and not Phase._is_reporting:
                Phase._is_reporting = True
                # No daemon: if the interpreter ended while it prints, the lock of stderr would abort the process.
                threading.Thread(target=self._report).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered.remove(self)

    @classmethod
    def _report(cls) -> None:
        main, idle_polls = threading.main_thread(), 0
        while True:
            with cls._lock:
                visible = [phase for phase in cls._entered if phase._visible]
                idle_polls = 0 if visible else idle_polls + 1
                if idle_polls > _MAX_IDLE_POLLS or not main.is_alive():
                    Phase._is_reporting = False
                    return
                if visible:
                    visible[-1]._show_if_due()
            main.join(POLL_SECONDS)  # the interpreter's end waits for this thread

    def _show_if_due(self) -> None:
        now, started = time.monotonic(), self._started
        text = f"{self._title}: {duration(now - started)}"
        if self._show is not None:
            self._show(text)
        elif now >= (self.last_line + LINE_SECONDS if self.last_line >= started else started + FIRST_LINE_SECONDS):
            print_line(text)


def current_phase() -> tuple[str, float] | None:
    """Return the title of this process's innermost phase and the seconds since its start, or None outside of any."""
    with Phase._lock:
        if not Phase._entered:
            return None
        phase = Phase._entered[-1]
        return phase._title, time.monotonic() - phase._started


def duration(seconds: float) -> str:
    """Format a duration in its two largest units: 1 min 43 s."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for (name, size), (below, small) in itertools.pairwise(units):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"
