"""Stop signals in every phase of a run: a checkpoint where there is something to save, and an end within seconds.

FAULTS=long tries each signal in each phase; the table of the measured seconds is printed with `pytest -s`.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1
from typing import NamedTuple

import pytest
import torch
from faults import runs
from faults.tiny import Tiny
from weights import steps

from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.run_folder import RunFolder

SIGNALS = (SIGTERM, SIGINT, SIGUSR1, SIGHUP)
BUSY = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
MAX_SECONDS = 10.0 * BUSY if runs.LONG else 120.0
"""From the signal to the end. In the short form only an end, as other tests may be running."""

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
TINY = f"{Path(__file__).with_name('tiny.py')}:Tiny"
TRAIN = (*runs.TINY, "--data.train=images.py:Images", "--data.workers=1", "--data.backend=torchvision", "--output=run")
TRAIN += ("--epochs=1000", "--checkpoint_every=1e6")
USE = ("--checkpoint=tiny.pt", f"--encoder={TINY}", "--data.image_size=8", "--device=cpu", "--output=results")
EVALUATE = ("knn", *USE, "--data.train=images.py:Images", "--data.workers=1", "--data.backend=torchvision", "--k=5")
EMBED = (*USE, "--data=images.py:Images", "--workers=1", "--backend=torchvision")


class Phase(NamedTuple):
    """Where a command is when the signal comes. at: whether it has come there, by its working directory and ranks."""

    at: Callable[[Path, list[runs.Process]], bool]
    options: tuple[str, ...] = ()
    hang: str = ""
    command: str = "train"
    saves: bool = True
    """Whether there is something to save."""


def imports_torch(_: Path, ranks: list[runs.Process]) -> bool:
    return all("libtorch" in Path(f"/proc/{rank.pid}/maps").read_text() for rank in ranks)


def is_reached(folder: Path, _: list[runs.Process]) -> bool:
    return (folder / "reached").exists()


def has_steps(folder: Path, _: list[runs.Process]) -> bool:
    return runs.count_steps(folder / "run") >= 2


def has_ended(folder: Path, ranks: list[runs.Process]) -> bool:
    return runs.count_steps(folder / "run") == 2 and "trained 2 steps" in ranks[0].output


PHASES = {
    "opening the images": Phase(is_reached, TRAIN, hang="opening", saves=False),
    "reading labels": Phase(is_reached, (*TRAIN, "--knn_every=1"), hang="images", saves=False),
    "first batch": Phase(is_reached, TRAIN, hang="worker"),
    "epoch": Phase(has_steps, TRAIN),
    "kNN": Phase(is_reached, (*TRAIN, "--max_steps=2", "--knn_every=1", "--data.val=images.py:Val"), hang="knn"),
    "checkpoint": Phase(has_steps, (*TRAIN, "--checkpoint_every=0.001")),  # after every step: much of the time
    "end": Phase(has_ended, (*TRAIN, "--max_steps=2")),
    "`evaluate`": Phase(is_reached, EVALUATE, "worker", "evaluate", saves=False),
    "`embed`": Phase(is_reached, EMBED, "worker", "embed", saves=False),
    "`doctor --data`": Phase(is_reached, ("--data", "images.py:Images"), "images", "doctor", saves=False),
    "start": Phase(imports_torch, TRAIN, saves=False),  # the last, as the first `fork` takes seconds
}
ONE, TWO, BOTH = TARGETS = ("1 process", "2 ranks, to one", "2 ranks, to both")


class Cell:
    """A command that gets a signal in a phase: a cell of the table."""

    def __init__(self, folder: Path, name: str, number: signal.Signals, target: str) -> None:
        """Start the command in a folder, the working directory."""
        self.name, self.number, self.target = name, number, target
        self.phase = PHASES[name]
        self.folder, self.signaled_at, self.seconds = folder, 0.0, 0.0
        (folder / "images.py").write_text(IMAGES)
        torch.save(Tiny().state_dict(), folder / "tiny.pt")
        os.mkfifo(folder / "pipe")
        count = 1 if target == ONE else 2
        if name == "start":
            variables = runs.variables_of_ranks(count)
            self.ranks = [runs.start(*self.phase.options, HANG="", **rank) for rank in variables]
        else:
            command, hang = self.phase.command, self.phase.hang
            self.ranks = runs.fork(*self.phase.options, ranks=count, command=command, HANG=hang)

    def advance(self) -> None:
        """Signal the process groups, as a terminal does, once the phase is reached; note when all have ended."""
        if not self.signaled_at:
            if self.phase.at(self.folder, self.ranks):
                rank = SIGNALS.index(self.number) % 2  # either one
                self.signaled_at = time.monotonic()
                for process in self.ranks[rank : rank + 1] if self.target == TWO else self.ranks:
                    with contextlib.suppress(ProcessLookupError):  # at the end
                        os.killpg(process.pid, self.number)
        elif not self.seconds and all(rank.poll() is not None for rank in self.ranks):
            self.seconds = time.monotonic() - self.signaled_at

    def check(self) -> None:
        printed = "".join(rank.output + rank.errors for rank in self.ranks)
        cell = f"{self.name}, {self.number.name}, {self.target}: {self.seconds:.1f} s\n{printed}"
        is_train = self.phase.command == "train"
        assert {rank.poll() for rank in self.ranks} == {0 if is_train else 128 + self.number}, cell
        assert self.seconds < MAX_SECONDS, cell
        assert "Traceback" not in printed, cell
        if self.name != "end":
            assert printed.count(f"stopped by {self.number.name}") == 1, cell
        checkpoint = RunFolder(self.folder / "run").checkpoint
        assert checkpoint.exists() == self.phase.saves, cell
        if self.phase.saves and self.name != "first batch":
            assert load_checkpoint(checkpoint)["step"] == steps(self.folder / "run")[-1]["step"] >= 2, cell


@pytest.fixture(scope="module")
def table() -> Iterator[list[Cell]]:
    """The cells whose commands have ended."""
    cells: list[Cell] = []
    yield cells
    print("\n| phase |", " | ".join(TARGETS), "|\n|---|" + "---|" * len(TARGETS))
    for name in PHASES:
        columns = [[f"{c.seconds:.1f}" for c in cells if (c.name, c.target) == (name, target)] for target in TARGETS]
        print(f"| {name} |", " | ".join(map(", ".join, columns)), "|")


# Each signal and each phase once, at the same time. In the long form, the signals of one phase at a time.
ONE_PROCESS = [(name, SIGNALS[index % len(SIGNALS)], ONE) for index, name in enumerate(PHASES)]
TWO_RANKS = [("opening the images", SIGINT, BOTH), ("kNN", SIGUSR1, TWO), ("start", SIGHUP, TWO)]
ROWS = [(name, target) for name in PHASES for target in (TARGETS if PHASES[name].command != "doctor" else (ONE,))]
BATCHES = [[(name, number, target) for number in SIGNALS] for name, target in ROWS]


@pytest.mark.parametrize(
    "batch", BATCHES if runs.LONG else [ONE_PROCESS, TWO_RANKS], ids=lambda b: f"{b[0][0]}, {b[0][2]}"
)
def test_a_signal_ends_all_ranks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    table: list[Cell],
    nothing_left: Callable[..., None],
    batch: list[tuple[str, signal.Signals, str]],
) -> None:
    cells: list[Cell] = []
    for index, each in enumerate(batch):
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)
        cells.append(Cell(folder, *each))
    deadline = time.monotonic() + 60 + MAX_SECONDS
    while any(not cell.seconds for cell in cells):
        for cell in cells:
            cell.advance()
        assert time.monotonic() < deadline, [(c.name, c.ranks[0].output, c.ranks[0].errors) for c in cells]
        time.sleep(0.005)
    table += cells
    for cell in cells:
        cell.check()
    nothing_left(tmp_path)


@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGHUP] if runs.LONG else [SIGHUP])
def test_a_signal_to_torchrun_ends_all_ranks(
    tmp_path: Path, nothing_left: Callable[..., None], number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = runs.start(*runs.TINY, "--epochs=1000", "--checkpoint_every=1e6", f"--output={run}", ranks=2)
    runs.wait_for_step(process, run, 3)
    started = time.monotonic()
    process.send_signal(number)
    assert process.wait(MAX_SECONDS) == 1, "torchrun's own exit code"
    print(f"\n{number.name} to torchrun: {time.monotonic() - started:.1f} s")
    assert f"stopped by {number.name} at step" in process.output
    assert load_checkpoint(RunFolder(run).checkpoint)["step"] == steps(run)[-1]["step"] >= 3
    nothing_left(run)


def test_a_second_sigint_ends_a_step_that_hangs(tmp_path: Path) -> None:
    faulty = f"--model.encoder={Path(__file__).with_name('faulty.py')}:Faulty"
    environment = {"FAULT": "hang", "FAULT_RANK": "0", "RANK": "0"}
    (process,) = runs.fork(*runs.TINY, faulty, f"--output={tmp_path}", **environment)
    runs.wait_for(lambda: "in the third step" in process.output, process)
    deadline = time.monotonic() + MAX_SECONDS
    while process.poll() is None:
        assert time.monotonic() < deadline
        process.send_signal(SIGINT)
        time.sleep(1.0)  # one that comes sooner counts as the same Ctrl-C
    assert process.poll() == 128 + SIGINT


def test_a_run_with_a_time_limit_is_resumed(tmp_path: Path) -> None:
    limited, whole = tmp_path / "limited", tmp_path / "whole"
    options = (*runs.TINY, "--epochs=1000", "--checkpoint_every=1e6")
    for limit in (5, 20, 80):  # seconds; a busy machine may need more to come to a step
        started = time.monotonic()
        (process,) = runs.fork(*options, f"--output={limited}", f"--time_limit={limit}s")
        output = process.end()
        assert time.monotonic() - started < (limit if runs.LONG else 2 * limit + MAX_SECONDS)
        if RunFolder(limited).checkpoint.exists():
            break
    step = load_checkpoint(RunFolder(limited).checkpoint)["step"]
    assert f"stopped by the time limit at step {step}" in output
    for run in (limited, whole):
        runs.fork(*options, f"--output={run}", f"--max_steps={step + 5}")[0].end()
    states = [load_checkpoint(RunFolder(run).checkpoint) for run in (limited, whole)]
    for part in ("model", "optimizer"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
