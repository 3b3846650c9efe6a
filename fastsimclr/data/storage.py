"""Where the bytes of images are: files on disk, or remote ones (fastsimclr/data/remote.py)."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fastsimclr.errors import UserError

Extent = tuple[str, int, int | None]
"""Path of a file, offset in it, and number of bytes; None: to its end."""


class UnreachableStorage(UserError):
    """Storage that does not answer or refuses access. No image is at fault, so none may be replaced for it."""


class Storage(ABC):
    """Reads parts of files. Threads may share it, and it can be sent to worker processes."""

    parallel_reads: ClassVar[int] = 1
    """Number of reads that must run at the same time to hide their latency."""

    @abstractmethod
    def read(self, path: str, offset: int = 0, size: int | None = None) -> NDArray[np.uint8]:
        """Return `size` bytes of a file, or fewer if it ends before; None: all from `offset`.

        Raises OSError, with a reason as its strerror, if the file cannot be read, and UnreachableStorage.
        """

    @abstractmethod
    def stat(self, path: str) -> tuple[int, int]:
        """Return a file's size in bytes and a number that changes with its content. Raises OSError."""

    @abstractmethod
    def plan(self, extents: Iterable[Extent]) -> None:
        """Announce the next reads in their order. They replace those announced before."""


class LocalFiles(Storage):
    """Files on disk."""

    def read(self, path: str, offset: int = 0, size: int | None = None) -> NDArray[np.uint8]:
        return np.fromfile(path, np.uint8, count=-1 if size is None else size, offset=offset)

    def stat(self, path: str) -> tuple[int, int]:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns

    def plan(self, extents: Iterable[Extent]) -> None:
        pass  # the system reads ahead


LOCAL = LocalFiles()
