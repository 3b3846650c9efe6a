"""Ranks of evaluate and embed: they end together, and say why."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.runs import fork, variables_of_ranks
from faults.tiny import Tiny

LIMIT_SECONDS = 120
"""A rank that is killed is found within 10 s on a machine that is not busy; without the watch, the other hangs."""
COMMON = ("--checkpoint=tiny.pt", f"--encoder={Path(__file__).with_name('tiny.py')}:Tiny", "--data.image_size=8")
COMMON += ("--device=cpu", "--output=results")
COMMANDS = {
    "evaluate": ("knn", *COMMON, "--data.train=images.py:Images", "--data.workers=0", "--k=5"),
    "embed": (*COMMON, "--data=images.py:Images", "--workers=0"),
}
# Images of which rank 1 waits for the first, from a pipe into which nobody writes.
IMAGES = """
import os
from pathlib import Path
import numpy as np

class Images:
    targets = [index % 4 for index in range(64)]
    def __len__(self):
        return 64
    def __getitem__(self, index):
        if "PIPE" in os.environ and os.environ["RANK"] == "1":
            Path("reached").touch()
            open(os.environ["PIPE"]).read()
        return np.full((8, 8, 3), 4 * index % 256, np.uint8), index % 4
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images.py").write_text(IMAGES)
    torch.save(Tiny().state_dict(), tmp_path / "tiny.pt")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_rank_that_is_killed_ends_the_other(command: str, folder: Path, nothing_left: Callable[..., None]) -> None:
    first, second = fork(*COMMANDS[command], ranks=2, command=command, PIPE="pipe")
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (folder / "reached").exists():
        assert time.monotonic() < deadline, first.errors
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    assert first.wait(LIMIT_SECONDS) == 1
    (line,) = [line for line in first.errors.splitlines() if "error" in line]
    assert line.startswith(f"fastsimclr.{command}: error: rank 1 (process {second.pid} on ")
    assert "Traceback" not in first.errors
    nothing_left()


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("evaluate", "--k=6", "--k 6 instead of 5"),
        ("embed", "--data.image_size=16", "--data.image_size "),
    ],
)
def test_ranks_with_different_options_end_together(command: str, option: str, message: str) -> None:
    ranks = [
        fork(*COMMANDS[command], *[option] * rank, command=command, **variables)[0]
        for rank, variables in enumerate(variables_of_ranks(2))
    ]
    assert [rank.wait() for rank in ranks] == [2, 2]
    (line,) = [line for rank in ranks for line in rank.errors.splitlines() if "error" in line]
    assert line.startswith(f"fastsimclr.{command}: error: ranks: got {message}")
    assert "on rank 1" in line
