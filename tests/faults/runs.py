"""Runs of the training command as real processes, and what is left of them when they have ended.

    process = start(*TINY, f"--output={run}")             # python -m fastsimclr.train, as a user starts it
    process = start(*TINY, f"--output={run}", ranks=2)    # two ranks under torchrun
    process, = fork(*TINY, f"--output={run}")             # from a process that has imported torch: 2 s instead of 8 s
    ranks = fork(*TINY, f"--output={run}", ranks=2)       # two ranks without torchrun
    wait_for_step(process, run, 3)
    process.send_signal(signal.SIGKILL)

The fixture `nothing_left` of conftest.py then checks that no process, shared memory or incomplete file is left.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

LONG = os.environ.get("FAULTS") == "long"
"""Whether to run the tests' long form, whose figures are in docs/reliability.md. It is run by hand."""
# A step takes about 10 ms on one core, an epoch has 90 steps: 1,433 images of 8x8 pixels.
TINY = [
    "--data.train=digits",
    "--data.image_size=8",
    f"--model.encoder={Path(__file__).with_name('tiny.py')}:Tiny",
    "--model.hidden=16",
    "--model.out=8",
    "--batch_size=16",
    "--epochs=2",
    "--knn_every=0",
    "--device=cpu",
    "--precision=fp32",
    "--log=none",
]
SHARED_MEMORY = Path("/dev/shm")
_MARKER = "FASTSIMCLR_TESTS", f"{os.getpid()}-{time.time_ns()}"
"""Environment variable of every process that this module starts, which their children inherit."""
_ENVIRONMENT = {_MARKER[0]: _MARKER[1], "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}  # a signal prints the stacks


class Process:
    """A process that `start` or `fork` has started, the leader of its own session and process group."""

    def __init__(self, pid: int, folder: Path, popen: "subprocess.Popen[bytes] | None" = None) -> None:
        self.pid = pid
        self._folder, self._popen = folder, popen

    def poll(self) -> int | None:
        """Return the exit code, -N after signal N; None while the process runs."""
        if self._popen is not None:
            return self._popen.poll()
        with contextlib.suppress(FileNotFoundError):
            return int((self._folder / str(self.pid)).read_text())
        return None

    def wait(self, timeout: float = 600) -> int:
        """Wait for the process and return its exit code. Fails after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"still running after {timeout} s\n{self.output}\n{self.errors}"
            time.sleep(0.01)
        return code

    def end(self, timeout: float = 600) -> str:
        """Wait for the process, which must succeed, and return its standard output."""
        assert self.wait(timeout) == 0, self.errors
        return self.output

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def output(self) -> str:
        return (self._folder / "out").read_text(errors="replace")

    @property
    def errors(self) -> str:
        return (self._folder / "err").read_text(errors="replace")


def start(
    *options: str,
    ranks: int = 1,
    torchrun: tuple[str, ...] = ("--standalone",),
    prefix: tuple[str, ...] = (),
    **environment: str,
) -> Process:
    """Start `python -m fastsimclr.train`, under torchrun with these options if ranks > 1.

    prefix: a command that runs the rest of its command line, such as `ip netns exec NAME`.
    """
    launcher = ["-m", "torch.distributed.run", *torchrun, f"--nproc-per-node={ranks}"] if ranks > 1 else []
    separator = ["--"] if ranks > 1 else []  # otherwise torchrun takes --log for an abbreviation of --log-dir
    folder = _new_folder()
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        popen = subprocess.Popen(
            [*prefix, sys.executable, *launcher, "-m", *separator, "fastsimclr.train", *options],
            stdout=out,
            stderr=err,
            start_new_session=True,
            env=os.environ | _ENVIRONMENT | environment,
        )
    return Process(popen.pid, folder, popen)


def fork(*options: str, ranks: int = 1, command: str = "train", **environment: str) -> list[Process]:
    """Start a command, with its own arguments, by a fork of a process that has imported PyTorch: one for each rank.

    There is no torchrun, which would end the other ranks when one has ended.
    """
    processes = []
    for variables in variables_of_ranks(ranks):
        folder = _new_folder()
        for name in ("out", "err"):
            (folder / name).touch()
        job = {
            "command": command,
            "options": options,
            "environment": environment | variables,
            "folder": str(folder),
            "cwd": os.getcwd(),
        }
        processes.append(Process(_server().fork(job), folder))
    return processes


def variables_of_ranks(ranks: int) -> list[dict[str, str]]:
    """Return the environment variables of each rank, as torchrun sets them; none for a single process."""
    if ranks == 1:
        return [{}]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def wait_for(condition: Callable[[], bool], process: Process, timeout: float = 600) -> None:
    """Wait until the condition holds, which must come while the process runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"exit code {process.poll()}\n{process.output}\n{process.errors}"
        assert time.monotonic() < deadline, f"not in {timeout} s\n{process.errors}"
        time.sleep(0.005)


def wait_for_step(process: Process, run: Path, step: int, timeout: float = 600) -> None:
    """Wait until metrics.jsonl of the run has `step` steps. Its checkpoint, if one is due, may be incomplete then."""
    wait_for(lambda: count_steps(run) >= step, process, timeout)


def count_steps(run: Path) -> int:
    """Return the number of steps in metrics.jsonl, which may not exist, without an incomplete last line."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    return sum(line.endswith(b"\n") and b'"loss"' in line for line in lines)


def living() -> list[int]:
    """Return the ids of the processes that `start` and `fork` have started, and of all their descendants."""
    marker, found = "=".join(_MARKER).encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_ours = marker in (entry / "environ").read_bytes().split(b"\0")  # empty for a zombie
            if is_ours and int(entry.name) not in (os.getpid(), _Server.pid):
                found.append(int(entry.name))
    return found


def kill_all() -> None:
    """Kill all `living` processes."""
    while pids := living():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def shared_memory() -> set[str]:
    """Return the names of all files in /dev/shm, but for joblib's, which fastsimclr does not start processes with."""
    return {str(file) for file in SHARED_MEMORY.rglob("*") if not file.name.startswith("sem.loky-")}


def leftovers(before: set[str], *folders: Path) -> list[str]:
    """Return what is left: living processes, files in /dev/shm, and incomplete files in the folders.

    before: the files of `shared_memory` that do not count. Nor do those that another living process uses.
    """
    found = [f"process {pid}: {_command(pid)}" for pid in living()]
    if new := shared_memory() - before:
        found += sorted(new - _mapped_by_others())
    return found + [str(file) for folder in folders for file in folder.rglob("*.partial")]


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return "ended"


def _mapped_by_others() -> set[str]:
    ours, used = set(living()), set()
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) not in ours:
            with contextlib.suppress(OSError):
                lines = (entry / "maps").read_text().splitlines()
                used |= {line[line.index("/dev/shm/") :] for line in lines if "/dev/shm/" in line}
                used |= {os.readlink(link) for link in (entry / "fd").iterdir()}
    return used


def _new_folder() -> Path:
    """Return a new folder for the output of a process, in that of this session, which is removed at its end."""
    global _folder
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(prefix="fastsimclr-runs-")
    return Path(tempfile.mkdtemp(dir=_folder.name))


_folder: "tempfile.TemporaryDirectory[str] | None" = None


class _Server:
    """The process that `fork` forks: it imports PyTorch, once, and then reads a job from each line of its input."""

    pid = 0

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | _ENVIRONMENT,
        )
        _Server.pid = self._process.pid
        atexit.register(self.close)

    def fork(self, job: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def _server() -> _Server:
    global _running_server
    if _running_server is None:
        _running_server = _Server()
    return _running_server


_running_server: _Server | None = None


def _serve() -> int:
    """Main function of the server, and of each process that it forks, which returns the command's exit code."""
    import sklearn.datasets  # noqa: F401 - the digits

    import fastsimclr.training.pretrain  # noqa: F401 - what the command imports when it runs
    from fastsimclr.config import parse
    from fastsimclr.stopping import run_process

    parse([])  # which reads the docstrings of all options, once
    folders: dict[int, Path] = {}
    while True:
        # Polled: the handler of a SIGCHLD that comes just before the read of a job would wait for that job.
        while not select.select([sys.stdin], [], [], 0.01 if folders else None)[0]:
            _write_exit_codes(folders)
        line = sys.stdin.readline()
        if not line:
            return 0
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.chdir(job["cwd"])
            os.environ.update(job["environment"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for name, descriptor in (("out", 1), ("err", 2)):
                os.dup2(os.open(Path(job["folder"]) / name, os.O_WRONLY), descriptor)
            main = import_module(f"fastsimclr.{job['command']}").main
            run_process(partial(main, job["options"]))
        folders[pid] = Path(job["folder"])
        print(pid, flush=True)


def _write_exit_codes(folders: dict[int, Path]) -> None:
    """Reap the children that have ended, by process id, and write the exit code of each to its folder."""
    while folders and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        file = folders.pop(ended[0]) / str(ended[0])
        file.with_suffix(".part").write_text(str(os.waitstatus_to_exitcode(ended[1])))
        file.with_suffix(".part").rename(file)


if __name__ == "__main__":
    sys.exit(_serve())
