"""What surrounds a run: an unusable folder, variable or file ends it with exit code 2 and one line with the reason."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults.runs import TINY

from fastsimclr.cli import main

pytestmark = pytest.mark.slow
RUN = [
    "train",
    "--data.train=digits",
    "--model.encoder=resnet18",
    "--model.stem=imagenet",
    "--data.image_size=16",
    "--batch_size=8",
]
RUN += ["--max_steps=1", "--epochs=1", "--device=cpu", "--knn_every=0", "--data.workers=0"]


@pytest.mark.parametrize(
    ("options", "variables", "words"),
    [
        (["--output=file/run"], {}, ["file/run", "Not a directory"]),
        (["--output=caf\udce9"], {}, ["--output: got", "UTF-8"]),
        (["--data.val=" + "x" * 5000], {}, ["x…x", "File name too long"]),
        (["--config=latin1.yaml"], {}, ["--config: got latin1.yaml, which cannot be read"]),
        ([], {"WORLD_SIZE": "2"}, ["RANK: got no value", "torchrun"]),
        ([], {"WORLD_SIZE": ""}, ["WORLD_SIZE: got ''", "unset"]),
        ([], {"RANK": "3"}, ["RANK: got 3 with WORLD_SIZE 1"]),
        ([], {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, ["MASTER_ADDR: got no host"]),
    ],
)
def test_error_is_one_line(
    options: list[str],
    variables: dict[str, str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("latin1.yaml").write_bytes(b"output: caf\xe9")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main([*RUN, "--output=run", *options]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("fastsimclr.train: error: ")
    assert len(error) < 500
    for word in words:
        assert word in error


def test_workers_in_a_folder_with_a_long_name(tmp_path: Path) -> None:
    folder = tmp_path / ("slurm_job_" * 10)
    folder.mkdir()
    source = f"import sys; from fastsimclr.cli import main; sys.exit(main({[*RUN, '--data.backend=torchvision']!r}))"
    source = source.replace("--data.workers=0", "--data.workers=1")
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "TMPDIR: got" in done.stderr.splitlines()[-1]


def test_output_without_a_reader() -> None:
    command = f"set -o pipefail; {sys.executable} -m fastsimclr.train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("size", ["4k", "48k", "1m"])  # no room for a semaphore, the images, a batch
def test_shared_memory_that_is_too_small(size: str, tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "bash", "-c", mount], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    options = [*TINY, "--data.backend=torchvision", "--data.workers=2", "--data.image_size=224", f"--output={tmp_path}"]
    command = shlex.join([sys.executable, "-m", "fastsimclr.train", *options])
    # Returns when no process is left that has inherited the pipes.
    done = subprocess.run(["unshare", "-m", "bash", "-c", f"{mount}; exec {command}"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("fastsimclr.train: error: /dev/shm: got ")


@pytest.mark.parametrize("is_importing", [False, True])
def test_a_forkserver_that_imports_ends_with_its_parent(is_importing: bool, tmp_path: Path) -> None:
    wait = "while not os.path.exists('importing'): time.sleep(0.01)" if is_importing else "pass"
    Path(tmp_path, "torchvision.py").write_text(
        "import time\nopen('importing', 'w').close()\ntime.sleep(10)\nopen('survived', 'w').close()\n"
    )
    source = f"""
import os, signal, time
from fastsimclr.data.workers import _forkserver
os.environ["PYTHONPATH"] = os.pathsep.join([{str(tmp_path)!r}, os.environ.get("PYTHONPATH", "")])
_forkserver()
{wait}
os.kill(os.getpid(), signal.SIGKILL)
"""
    # Returns when no process is left that has inherited the pipes.
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not Path(tmp_path, "survived").exists()
