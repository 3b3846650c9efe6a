"""Ranks that die, stop, raise or hang: the others end, and say which one it was."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.runs import TINY, Process, count_steps, fork, free_port, living, start, wait_for, wait_for_step

from fastsimclr.run_folder import RunFolder

STALL_SECONDS = 5
OPTIONS = ["--checkpoint_every=0.1", f"--stall_timeout={STALL_SECONDS}", "--data.workers=0"]
FAULTY = [f"--model.encoder={Path(__file__).with_name('faulty.py')}:Faulty"]
LIMIT_SECONDS = 4 * STALL_SECONDS
"""The timeout, a few polls of the ranks, and the other load of a busy machine."""


def check_end(process: Process, rank: int, says: str, run: Path) -> None:
    """Check that the process of `rank` ends with a line that has the text, and with its stacks in the run's folder."""
    assert process.wait(LIMIT_SECONDS) == 1
    assert says in process.errors
    stacks = (run / "stacks" / f"rank-{rank}.txt").read_text()
    assert "most recent call first" in stacks
    assert "pretrain.py" in stacks


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_ends_the_other(
    tmp_path: Path, number: int, rank: int, nothing_left: Callable[..., None]
) -> None:
    ranks = fork(*TINY, *OPTIONS, "--epochs=200", f"--output={tmp_path}", ranks=2)
    wait_for_step(ranks[0], tmp_path, 3)
    ranks[rank].send_signal(number)
    # Rank 0 holds the store, which therefore says nothing more.
    says = "rank 1 (process" if rank == 1 else "rank 0 does not answer"
    check_end(ranks[1 - rank], 1 - rank, says, tmp_path)
    if number == signal.SIGSTOP:
        ranks[rank].send_signal(signal.SIGKILL)
    nothing_left(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_the_other(tmp_path: Path, rank: int, nothing_left: Callable[..., None]) -> None:
    environment = {"FAULT": "raise", "FAULT_RANK": str(rank)}
    ranks = fork(*TINY, *OPTIONS, *FAULTY, f"--output={tmp_path}", ranks=2, **environment)
    check_end(ranks[1 - rank], 1 - rank, "", tmp_path)
    assert ranks[rank].wait(LIMIT_SECONDS) == 1
    assert f"rank {rank} (process {ranks[rank].pid} on " in ranks[rank].errors
    assert f"raised RuntimeError: a fault of rank {rank}; phase: " in ranks[rank].errors
    assert "Traceback" in ranks[rank].errors
    nothing_left(tmp_path)


def test_a_rank_that_hangs_ends_both(tmp_path: Path, nothing_left: Callable[..., None]) -> None:
    environment = {"FAULT": "hang", "FAULT_RANK": "1"}
    ranks = fork(*TINY, *OPTIONS, *FAULTY, f"--output={tmp_path}", ranks=2, **environment)
    for rank, process in enumerate(ranks):
        check_end(process, rank, "", tmp_path)
    assert "has made no progress for 5.0 s; phase: " in ranks[0].errors + ranks[1].errors
    assert "faulty.py" in (tmp_path / "stacks" / "rank-1.txt").read_text()
    nothing_left(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_long_phase_of_one_rank_is_not_a_stall(tmp_path: Path, rank: int) -> None:
    environment = {"FAULT": "slow", "FAULT_RANK": str(rank), "SECONDS": "5"}
    options = [*TINY, *FAULTY, "--stall_timeout=3", "--max_steps=5", f"--output={tmp_path}"]
    for process in fork(*options, ranks=2, **environment):
        process.end()
    assert not (tmp_path / "stacks").exists()


def test_torchrun_restarts_from_the_checkpoint_and_no_rank_outlives_it(
    tmp_path: Path, nothing_left: Callable[..., None]
) -> None:
    """With a static port, whose store keeps the addresses of the first ranks."""
    torchrun = (f"--master-port={free_port()}", "--max-restarts=1")
    options = [
        *TINY,
        *OPTIONS,
        "--epochs=200",
        f"--output={tmp_path}",
        "--data.workers=1",
        "--data.backend=torchvision",
    ]
    process = start(*options, ranks=2, torchrun=torchrun)
    wait_for(RunFolder(tmp_path).checkpoint.exists, process)
    (rank_1,) = [pid for pid in living() if is_rank(pid, 1)]
    os.kill(rank_1, signal.SIGKILL)
    wait_for(lambda: "resumed from" in process.output, process)
    steps = count_steps(tmp_path)
    wait_for(lambda: count_steps(tmp_path) > steps, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    nothing_left(tmp_path)


def is_rank(pid: int, rank: int) -> bool:
    """Whether the process is this rank, rather than a worker of it."""
    entry = Path(f"/proc/{pid}")
    is_command = b"fastsimclr.train" in (entry / "cmdline").read_bytes().split(b"\0")
    return is_command and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0")


def test_a_command_ends_while_a_daemon_thread_talks_to_a_store() -> None:
    source = """
import threading, time
from torch.distributed import TCPStore
from fastsimclr.stopping import run_process
server = TCPStore("localhost", 0, 1, True)
store = server.clone()
store.set("key", "value")
def ask():
    while True:
        store.multi_get(["key"] * 50)
threading.Thread(target=ask, daemon=True).start()
run_process(lambda: time.sleep(0.1) or print("printed") or 3)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (3, "printed\n"), done.stderr
