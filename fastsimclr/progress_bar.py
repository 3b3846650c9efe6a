"""Progress of long tasks on standard error: a tqdm bar on a terminal, plain lines elsewhere."""

import itertools
import sys
import time
from typing import Any

FIRST_LINE_SECONDS = 10.0
LINE_SECONDS = 60.0


class LineTimer:
    """Tells when the next line is due: 10 s after the start, then once a minute."""

    def __init__(self) -> None:
        self._next = time.monotonic() + FIRST_LINE_SECONDS

    def is_due(self) -> bool:
        """Whether to print a line now. If so, the next one is due a minute later."""
        due = time.monotonic() >= self._next
        if due:
            self.restart()
        return due

    def restart(self) -> None:
        """Make the next line due in a minute."""
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
