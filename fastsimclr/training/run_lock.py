"""The folder of a run, and the lock that keeps a second process from training into it."""

import fcntl
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastsimclr import distributed
from fastsimclr.config import Config
from fastsimclr.distributed import World, run_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.progress_bar import Phase
from fastsimclr.run_folder import RunFolder

RENEWAL_SECONDS = 2.0
"""Seconds between two renewals of a lock."""
MISSED_RENEWALS = 4
"""A lock that misses so many has lost its holder."""


@contextmanager
def open_run(config: Config, world: World) -> Iterator[RunFolder]:
    """Create the run's folder if needed, and keep it locked by rank zero within the context. All ranks call it.

    The folder is config.output, or a new one. It is removed at the end if it is still empty.
    Raises UserError on all ranks if another process has the lock, or if the folder cannot be written.
    """
    lock = run_on_all_ranks(lambda: _lock(config) if world.is_rank_zero else None, world)
    try:
        yield RunFolder(distributed.broadcast_object(lock and lock.folder, world))
    finally:
        if lock is not None:
            lock.release()


def _lock(config: Config) -> "RunLock":
    output = config.output
    try:
        return RunLock(Path(output) if output is not None else _new_folder(config))
    except OSError as error:
        raise UserError(
            f"--output: got {output or error.filename}, which cannot be written ({error.strerror})"
        ) from error


def _new_folder(config: Config) -> Path:
    """Create the folder runs/DATA-ENCODER-TIME, or with -2, -3 ... after it if another run has just created that."""
    data = re.sub(r"[^\w-]+", "-", Path(config.data.train or "").name.removesuffix(".tar")).strip("-")
    encoder = re.sub(r"[^\w-]+", "-", config.model.encoder).strip("-")
    name = f"runs/{data}-{encoder}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = Path(name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            os.makedirs(folder)
            return folder
    raise AssertionError


class RunLock:
    """The lock of a run's folder: its file `lock`, with the host, process and start time of the holder.

    The file is locked by flock, which the kernel releases when the process ends, however it does. That does not
    suffice on network file systems, which may not support it, or only between the processes of one machine. The holder
    therefore renews the time of the file, too. A lock that was left by another machine counts as held if its time
    changes within MISSED_RENEWALS, so that clocks need not agree.
    """

    def __init__(self, folder: Path) -> None:
        """Lock the folder, which is created if needed. Raises UserError if it is locked, OSError if that fails."""
        self.folder = folder
        self._path = RunFolder(folder).lock
        self._file, is_exclusive = self._open()
        try:
            holder = _read(self._file)
            if holder and not (is_exclusive and holder["machine"] == _machine()) and self._is_renewed():
                raise self._held(holder)
            record = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.truncate(self._file, 0)
            os.pwrite(self._file, json.dumps(record | {"machine": _machine()}).encode(), 0)
        except BaseException:
            os.close(self._file)
            raise
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the lock, and the folder if it is empty."""
        self._released.set()
        self._thread.join(RENEWAL_SECONDS)  # unless the file system hangs
        with suppress(OSError):  # removed by the user
            self._path.unlink()
            self.folder.rmdir()  # fails if there are files
        os.close(self._file)

    def _open(self) -> tuple[int, bool]:
        """Open and lock the file. Returns its descriptor, and whether the file system supports flock."""
        while True:
            with suppress(FileExistsError):  # a file, which os.open reports; or a folder that a holder has just removed
                self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # a holder has just removed the folder, or the file
                file, is_exclusive = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), True
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = _read(file)
                    os.close(file)
                    raise self._held(holder) from None
                except OSError:
                    is_exclusive = False
                if os.path.samestat(os.fstat(file), os.stat(self._path)):
                    return file, is_exclusive
                os.close(file)

    def _is_renewed(self) -> bool:
        """Whether the holder, which may be on another machine, renews the lock."""
        before = self._time()
        with Phase(f"waiting for a sign of the run that has locked {self.folder}"):
            for _ in range(2 * MISSED_RENEWALS):
                time.sleep(RENEWAL_SECONDS / 2)
                if self._time() != before:
                    return True
        return False

    def _time(self) -> int:
        file = os.open(self._path, os.O_RDONLY)  # NFS asks the server for the time of a file when it is opened
        try:
            return os.fstat(file).st_mtime_ns
        finally:
            os.close(file)

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL_SECONDS):
            with suppress(OSError):  # a full or unreachable disk: training reports it
                os.utime(self._file)

    def _held(self, holder: dict[str, Any]) -> UserError:
        by = (
            "process {pid} on {host} has been training since {started}".format_map(holder) if holder else "a run starts"
        )
        return UserError(
            f"--output: got {self.folder}, in which {by}; expected a folder that no other run uses: "
            "wait for that run, end it, or use another --output"
        )


def _read(file: int) -> dict[str, Any]:
    """Return the record of the lock's holder; empty if it was just created, or was torn by a power cut."""
    with suppress(ValueError):
        record = json.loads(os.pread(file, 4096, 0))
        if isinstance(record, dict) and {"host", "pid", "started", "machine"} <= record.keys():
            return record
    return {}


def _machine() -> str:
    """Return what tells machines apart, whose host names may be equal."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
