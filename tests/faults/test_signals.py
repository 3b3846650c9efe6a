"""Stop signals in every phase of a run: a checkpoint where there is something to save, and an end within seconds.

FAULTS=long tries each signal in each phase; the table of the measured seconds is printed with `pytest -s`.
"""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1
from typing import NamedTuple

import pytest
from faults import runs
from weights import steps

from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.run_folder import RunFolder

SIGNALS = (SIGTERM, SIGINT, SIGUSR1, SIGHUP)
MAX_SECONDS = 10.0 * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))  # 10 s on a machine that is not busy

# A user's data set. HANG is where reading from a pipe into which nobody writes takes for ever, as lost storage does.
IMAGES = """
import os
from pathlib import Path
import numpy as np
from torch.utils.data import get_worker_info

def hang_in(phase):
    if os.environ["HANG"] == phase and os.environ.get("RANK", "0") == "0":
        Path("reached").touch()
        open("pipe").read()

class Images:
    def __init__(self):
        hang_in("opening")
    def __len__(self):
        return 64
    def __getitem__(self, index):
        hang_in("images")
        if get_worker_info() is not None:
            hang_in("worker")
        return np.full((8, 8, 3), 4 * index % 256, np.uint8), index % 4

class Val(Images):
    def __init__(self):
        self.targets = [index % 4 for index in range(64)]
    def __getitem__(self, index):
        if get_worker_info() is not None:
            hang_in("knn")
        return super().__getitem__(index)
"""
OPTIONS = [*runs.TINY, "--data.train=images.py:Images", "--data.workers=1", "--data.backend=torchvision"]
OPTIONS += ["--epochs=1000", "--checkpoint_every=1e6", "--output=run"]


class Phase(NamedTuple):
    """Where a run is when the signal comes. at: its files show that it has come there."""

    at: Callable[[Path, runs.Process], bool]
    options: tuple[str, ...] = ()
    hang: str = ""
    command: str = "train"
    saves: bool = True
    """Whether there is something to save."""


def is_reached(folder: Path, process: runs.Process) -> bool:
    return (folder / "reached").exists()


def has_steps(folder: Path, process: runs.Process) -> bool:
    return runs.count_steps(folder / "run") >= 2


def has_ended(folder: Path, process: runs.Process) -> bool:
    return runs.count_steps(folder / "run") == 2 and "trained 2 steps" in process.output


PHASES = {
    "opening": Phase(is_reached, hang="opening", saves=False),
    "reading labels": Phase(is_reached, ("--knn_every=1",), hang="images", saves=False),
    "doctor --data": Phase(is_reached, ("--data", "images.py:Images"), "images", "doctor", saves=False),
    "first batch": Phase(is_reached, hang="worker"),
    "epoch": Phase(has_steps),
    "kNN": Phase(is_reached, ("--max_steps=2", "--knn_every=1", "--data.val=images.py:Val"), hang="knn"),
    "checkpoint": Phase(has_steps, ("--checkpoint_every=0.001",)),  # after every step: a large part of the time
    "end": Phase(has_ended, ("--max_steps=2",)),
}


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str], float]]:
    """Seconds from the signal to the end, by phase and signal."""
    seconds: dict[tuple[str, str], float] = {}
    yield seconds
    columns = list(dict.fromkeys(column for _, column in seconds))
    print("\n| phase |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
    for row in dict.fromkeys(row for row, _ in seconds):
        cells = [f"{seconds[row, column]:.1f}" if (row, column) in seconds else "" for column in columns]
        print(f"| {row} |", " | ".join(cells), "|")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    (tmp_path / "images.py").write_text(IMAGES)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(phase: Phase, folder: Path, ranks: int = 1) -> list[runs.Process]:
    """Start a run; return its processes when it has come to the phase."""
    options = [*OPTIONS, *phase.options] if phase.command == "train" else phase.options
    processes = runs.fork(*options, ranks=ranks, command=phase.command, HANG=phase.hang)
    deadline = time.monotonic() + 60
    while not phase.at(folder, processes[0]):
        assert time.monotonic() < deadline, processes[0].errors
        time.sleep(0.005)
    return processes


def seconds_to_end(processes: list[runs.Process], signaled: list[runs.Process], number: signal.Signals) -> float:
    """Signal the process groups of some ranks, as a terminal does; return the seconds until all have ended."""
    started = time.monotonic()
    for process in signaled:
        os.killpg(process.pid, number)
    for process in processes:
        process.wait(2 * MAX_SECONDS)
    return time.monotonic() - started


def check(phase: Phase, number: signal.Signals, seconds: float, processes: list[runs.Process], folder: Path) -> None:
    printed = processes[0].output + processes[0].errors
    assert {process.poll() for process in processes} == {0 if phase.command == "train" else 128 + number}, printed
    assert seconds < MAX_SECONDS, printed
    for process in processes:
        assert "Traceback" not in process.errors, process.errors
    checkpoint = RunFolder(folder / "run").checkpoint
    assert checkpoint.exists() == phase.saves
    if phase is not PHASES["end"]:
        assert f"stopped by {number.name}" in printed
    if phase.saves and phase is not PHASES["first batch"]:
        assert load_checkpoint(checkpoint)["step"] == steps(folder / "run")[-1]["step"] >= 2


# Each signal and each phase once; all pairs in the long form.
PAIRS = list(itertools.product(PHASES, SIGNALS))
if not runs.LONG:
    PAIRS = list(zip(PHASES, itertools.cycle(SIGNALS), strict=False))


@pytest.mark.parametrize(("name", "number"), PAIRS, ids=str)
def test_a_signal_ends_one_process(
    table: dict[tuple[str, str], float], folder: Path, name: str, number: signal.Signals
) -> None:
    phase = PHASES[name]
    processes = start(phase, folder)
    seconds = seconds_to_end(processes, processes, number)
    table[name, f"1 process, {number.name}"] = seconds
    check(phase, number, seconds, processes, folder)


@pytest.mark.parametrize("target", ["rank 0", "rank 1", "all"])
@pytest.mark.parametrize(
    ("name", "number"),
    list(itertools.product(PHASES, SIGNALS)) if runs.LONG else [("opening", SIGINT), ("kNN", SIGUSR1)],
    ids=str,
)
def test_a_signal_to_one_rank_ends_all(
    table: dict[tuple[str, str], float],
    folder: Path,
    name: str,
    number: signal.Signals,
    target: str,
) -> None:
    phase = PHASES[name]
    processes = start(phase, folder, ranks=2)
    signaled = {"rank 0": processes[:1], "rank 1": processes[1:], "all": processes}[target]
    seconds = seconds_to_end(processes, signaled, number)
    table[name, f"2 ranks, {number.name} to {target}"] = seconds
    check(phase, number, seconds, processes, folder)
