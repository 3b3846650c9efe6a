"""A disk that is full or cannot be written: the run warns once and goes on, and what can be kept is kept."""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.runs import TINY, fork, wait_for
from weights import steps

from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.run_folder import RunFolder

OPTIONS = [*TINY, "--checkpoint_every=0.1", "--max_steps=60"]  # a checkpoint each 9 steps


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MB. Skipped without the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    # It unmounts at the end of its input, also if this process is killed.
    unmount = ["sh", "-c", 'cat; umount -R -l "$0"', folder]
    with subprocess.Popen(unmount, stdin=subprocess.PIPE, start_new_session=True) as process:
        yield folder
    assert process.returncode == 0


def fill(disk: Path, left: int) -> Path:
    """Fill the disk but for about `left` bytes."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - left)))
    return filler


def test_run_on_a_full_disk(disk: Path) -> None:
    run = RunFolder(disk / "run")
    (process,) = fork(*OPTIONS, "--max_steps=20", f"--output={run}")
    process.end()
    filler = fill(disk, run.checkpoint.stat().st_size - 4096)
    (process,) = fork(*OPTIONS, f"--output={run}")
    assert "trained 60 steps" in process.end()
    assert "not written" not in process.errors, "the one before the newest made room"
    assert load_checkpoint(run.checkpoint)["step"] == 60

    fill(disk, 0)
    (process,) = fork(*OPTIONS, "--max_steps=90", f"--output={run}")
    assert process.wait() == 2
    (line,) = [line for line in process.errors.splitlines() if "error" in line]
    assert f"--output: got {run}, which cannot be written (No space left on device)" in line
    assert "Traceback" not in process.errors
    assert not list(run.path.rglob("*.partial"))

    filler.unlink()
    (process,) = fork(*OPTIONS, "--max_steps=90", f"--output={run}")
    process.end()
    assert load_checkpoint(run.checkpoint)["step"] == 90
    assert [record["step"] for record in steps(run.path)] == list(range(1, 91))


@pytest.mark.parametrize("is_cleared", [True, False])
def test_disk_that_fills_up(disk: Path, is_cleared: bool) -> None:
    run, options = RunFolder(disk / "run"), [*OPTIONS, "--max_steps=300", "--epochs=4", f"--output={disk / 'run'}"]
    (process,) = fork(*options)
    wait_for(run.checkpoint.exists, process)
    while "not written" not in process.errors:
        run.previous_checkpoint.unlink(missing_ok=True)  # the run would do so, and have room
        filler = fill(disk, 0)
        assert process.poll() is None
    if is_cleared:
        filler.unlink()
        process.end()
    else:
        assert process.wait() == 1
        (line,) = [line for line in process.errors.splitlines() if "error" in line]
        assert f"{run.checkpoint}: got no checkpoint of the last step (No space left on device)" in line
        assert 0 < load_checkpoint(run.checkpoint)["step"] < 300
        assert not list(run.path.rglob("*.partial"))
        filler.unlink()
        (resumed,) = fork(*options)
        resumed.end()
    assert process.errors.count("not written at step") == 1, "warned once"
    assert "Traceback" not in process.errors
    assert load_checkpoint(run.checkpoint)["step"] == 300
    assert [record["step"] for record in steps(run.path)] == list(range(1, 301))


def test_disk_that_becomes_read_only(disk: Path) -> None:
    run = RunFolder(disk / "run")
    (process,) = fork(*OPTIONS, "--max_steps=200", "--epochs=3", f"--output={run}")
    wait_for(run.checkpoint.exists, process)
    # Files that are open for writing keep a disk from becoming read-only, a bind mount on top of it does not.
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    assert process.wait() == 1
    subprocess.run(["umount", disk], check=True)
    assert process.errors.count("not written at step") == 1
    assert "Traceback" not in process.errors
    assert load_checkpoint(run.checkpoint)["step"] > 0


def test_file_size_limit(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    (process,) = fork(*OPTIONS, "--max_steps=200", "--epochs=3", f"--output={run}")
    wait_for(run.checkpoint.exists, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))  # as `ulimit -f 4`
    assert process.wait() == 1
    assert process.errors.count("not written at step") == 1
    assert "(File too large)" in process.errors
    assert "Traceback" not in process.errors
    assert load_checkpoint(run.checkpoint)["step"] > 0


def test_removed_output_is_made_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    (process,) = fork(*OPTIONS, "--max_steps=200", "--epochs=3", f"--output={run}")
    wait_for(run.checkpoint.exists, process)
    shutil.rmtree(run.path, ignore_errors=True)
    process.end()
    assert load_checkpoint(run.checkpoint)["step"] == 200


def test_checkpoint_that_cannot_be_opened(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    (process,) = fork(*OPTIONS, "--max_steps=200", "--epochs=3", f"--output={run}")
    wait_for(run.checkpoint.exists, process)
    obstacle = run.checkpoint.parent / "last.pt.partial"
    while not obstacle.is_dir():  # also for root, whom permissions do not stop
        with contextlib.suppress(FileExistsError):  # a checkpoint is being written
            obstacle.mkdir()
    assert process.wait() == 1
    assert process.errors.count("not written at step") == 1
    assert "Traceback" not in process.errors
    assert load_checkpoint(run.checkpoint)["step"] > 0
