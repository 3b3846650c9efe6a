"""A folder on a local disk that keeps what was read from remote storage, up to a size limit."""

import fcntl
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.storage_options import StorageOptions
from fastsimclr.errors import UserError

_FOLDERS = 256
_DISK_BLOCK = 4096  # bytes
_SAMPLE = 1000  # entries, of which the oldest are evicted: names are hashes, so any folders are a sample of all
_EVICTED = 0.1  # fraction of the sample that is evicted at a time, so that few entries need a listing
_PARTIAL = ".partial"
_CHECKSUM = struct.Struct("<I")
_USAGE = struct.Struct("<q")


class LocalCache:
    """Entries by name, in files that the processes of a node share.

    remote_images/xx/HASH holds the bytes of an entry and their checksum: a damaged one is fetched again.
    remote_images/usage holds the sum of their sizes. It is locked while an entry is written, so the limit is never
    exceeded. A file's modification time is that of its last use.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        """limit: bytes on disk. Raises UserError if the folder cannot be written to."""
        self._folder, self._limit = Path(folder).expanduser().absolute() / "remote_images", limit
        try:
            for number in range(_FOLDERS):
                (self._folder / f"{number:02x}").mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise UserError(
                f"--data.local_cache: got {folder}, which cannot be written to ({error.strerror}); "
                "expected a folder on a local disk"
            ) from error

    @classmethod
    def of(cls, options: StorageOptions) -> "LocalCache | None":
        return None if options.local_cache is None else cls(options.local_cache, int(options.local_cache_gb * 1e9))

    def get(self, name: str) -> NDArray[np.uint8] | None:
        """Return an entry and mark it as used. None if there is none; a damaged one is removed."""
        file = self._file(name)
        try:
            content = np.fromfile(file, np.uint8)
            os.utime(file)
        except OSError:  # evicted
            return None
        data, checksum = content[: -_CHECKSUM.size], content[-_CHECKSUM.size :].tobytes()
        if checksum == _checksum(name, data):
            return data
        with self._locked() as usage:
            self._remove(file, usage)
        return None

    def put(self, name: str, data: NDArray[np.uint8]) -> None:
        """Add an entry, for which the least recently used ones are evicted. Warns if the disk does not take it."""
        file, size = self._file(name), _on_disk(len(data) + _CHECKSUM.size)
        partial = file.with_suffix(_PARTIAL)
        try:
            with self._locked() as usage:
                if size > self._limit or file.exists():
                    return
                self._evict(usage.read() + size - self._limit, file.parent, usage)
                usage.add(size)  # first: a process killed here leaves the sum too large, never too small
                with open(partial, "wb") as opened:
                    data.tofile(opened)
                    opened.write(_checksum(name, data))
                os.replace(partial, file)
        except OSError as error:
            warnings.warn(
                f"{self._folder}: an image was not cached ({error.strerror}); it is fetched again", stacklevel=2
            )

    def _file(self, name: str) -> Path:
        digest = blake2b(name.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        return self._folder / digest[:2] / digest[2:]

    def _evict(self, needed: int, folder: Path, usage: "_Usage") -> None:
        """Free `needed` bytes: the oldest entries of a sample, which begins with those in `folder`."""
        first = int(folder.name, 16)
        sample: list[tuple[int, str, int]] = []
        for number in range(first, first + _FOLDERS):
            if needed <= 0:
                return
            with os.scandir(self._folder / f"{number % _FOLDERS:02x}") as found:
                for entry in found:
                    status = entry.stat()
                    is_partial = entry.name.endswith(_PARTIAL)  # of a killed process: goes first
                    sample.append((0 if is_partial else status.st_mtime_ns, entry.path, _on_disk(status.st_size)))
            if len(sample) < _SAMPLE and number + 1 < first + _FOLDERS:
                continue
            sample.sort()
            enough = max(needed, int(_EVICTED * sum(size for *_, size in sample)))
            for _, path, size in sample:
                if enough <= 0:
                    break
                self._remove(Path(path), usage)
                enough -= size
                needed -= size
            sample = []

    @staticmethod
    def _remove(file: Path, usage: "_Usage") -> None:
        try:
            size = file.stat().st_size
            file.unlink()
        except FileNotFoundError:  # removed by another process
            return
        usage.add(-_on_disk(size))

    @contextmanager
    def _locked(self) -> Iterator["_Usage"]:
        file = os.open(self._folder / "usage", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_size != _USAGE.size:  # new, or lost
                _Usage(file).add(sum(_on_disk(entry.stat().st_size) for entry in self._folder.glob("??/*")))
            yield _Usage(file)
        finally:
            os.close(file)


class _Usage:
    """The sum of the sizes of all entries, in a locked file."""

    def __init__(self, file: int) -> None:
        self._file = file

    def read(self) -> int:
        content = os.pread(self._file, _USAGE.size, 0)
        return _USAGE.unpack(content)[0] if len(content) == _USAGE.size else 0

    def add(self, size: int) -> None:
        os.pwrite(self._file, _USAGE.pack(max(0, self.read() + size)), 0)


def _on_disk(size: int) -> int:
    return -(-size // _DISK_BLOCK) * _DISK_BLOCK


def _checksum(name: str, data: NDArray[np.uint8]) -> bytes:
    """Return the checksum of an entry. It covers the name, so a file that was moved is no entry."""
    return _CHECKSUM.pack(zlib.crc32(data.data, zlib.crc32(name.encode(errors="surrogateescape"))))
