"""The lock of a run's folder: only one process trains into it at a time."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.runs import TINY, fork, wait_for, wait_for_step

from fastsimclr.config import Config
from fastsimclr.distributed import SINGLE_PROCESS
from fastsimclr.errors import UserError
from fastsimclr.run_folder import RunFolder
from fastsimclr.training import run_lock
from fastsimclr.training.run_lock import RunLock, open_run


def test_a_second_start_is_refused_until_the_first_run_is_killed(
    tmp_path: Path, nothing_left: Callable[..., None]
) -> None:
    options = [*TINY, f"--output={tmp_path}", "--checkpoint_every=0.1"]
    (first,) = fork(*options, "--epochs=100")
    wait_for_step(first, tmp_path, 1)
    (second,) = fork(*options)
    assert second.wait() == 2
    errors = [line for line in second.errors.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert f"--output: got {tmp_path}, in which process {first.pid} on " in errors[0]
    wait_for(RunFolder(tmp_path).checkpoint.exists, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (third,) = fork(*options, "--max_steps=20")
    assert "resumed from" in third.end()
    assert not (tmp_path / "lock").exists()
    nothing_left(tmp_path)


@pytest.mark.parametrize("lives", [False, True])
def test_a_lock_of_another_machine_is_held_while_it_is_renewed(
    tmp_path: Path, lives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system that locks files for the processes of one machine only."""
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 0.2)
    lock = RunLock(tmp_path)
    monkeypatch.setattr(run_lock, "_machine", lambda: "another")
    monkeypatch.setattr(run_lock.fcntl, "flock", lambda *_: None)  # as if the file system ignored it
    if lives:
        with pytest.raises(UserError, match="has been training since"):
            RunLock(tmp_path)
        lock.release()
    else:
        lock._released.set()  # its thread ends, as if the machine had failed
        lock._thread.join()
    RunLock(tmp_path).release()


def test_at_most_one_of_many_holds_the_lock(tmp_path: Path) -> None:
    """Each removes the file when it releases the lock, while others open it."""
    held, counts, failures = [], [], []

    def hold() -> None:
        while len(counts) < 100:
            try:
                lock = RunLock(tmp_path / "run")
            except UserError:
                continue
            except BaseException as error:
                failures.append(error)
                raise
            held.append(lock)
            counts.append(len(held))
            time.sleep(0.001)
            held.remove(lock)
            lock.release()

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(counts) == {1}
    assert not failures
    assert not (tmp_path / "run").exists()  # it was empty


@pytest.mark.parametrize("content", [b"\0" * 64, b'["no", "record"]'])
def test_a_torn_lock_is_taken_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    RunLock(tmp_path).release()


def test_new_folders_of_the_same_second_differ(working_directory: Path) -> None:
    folders = set()
    for _ in range(3):
        with open_run(Config(), SINGLE_PROCESS) as folder:
            (folder.path / "metrics.jsonl").touch()
            folders.add(folder.path)
    assert len(folders) == 3


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for output in (file, file / "run"):
        config = Config(output=str(output))
        with pytest.raises(UserError, match=f"{output}, which cannot be written"), open_run(config, SINGLE_PROCESS):
            pass
