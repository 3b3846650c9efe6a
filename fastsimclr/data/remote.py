"""Files at s3://, gs://, hf:// and https:// URLs, read in ranges of bytes through fsspec.

The bytes of images are requested before they are needed, by threads of each process.
"""

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsimclr.data.local_cache import LocalCache
from fastsimclr.data.remote_requests import THREADS, fetch, submit
from fastsimclr.data.sources import EncodedSource, Source
from fastsimclr.data.storage import Extent, Storage
from fastsimclr.data.storage_options import StorageOptions
from fastsimclr.errors import UserError

_READ_AHEAD_BYTES = 128 << 20  # per process
# What the file systems call the content's version in a listing.
_VERSIONS = (
    *("ETag", "etag", "generation", "md5Hash", "blob_id"),
    *("Content-MD5", "Digest", "LastModified", "Last-Modified"),
)


class RemoteFiles(Storage):
    """Files of one remote file system, with the sizes and versions that they had when they were listed."""

    parallel_reads = THREADS

    def __init__(self, files: dict[str, dict[str, Any]], query: str = "") -> None:
        """files: what fsspec reports of each URL. query: appended to each URL in requests, and never shown."""
        rows = np.array([(_place(url), _size(url, info), _version(info)) for url, info in files.items()], np.int64)
        self._table = torch.from_numpy(rows[np.argsort(rows[:, 0])])  # a tensor: workers share it
        self._query = query
        self.cache: LocalCache | None = None
        self._ahead: _ReadAhead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": None}

    def read(self, path: str, offset: int = 0, size: int | None = None) -> NDArray[np.uint8]:
        extent = path, offset, size
        planned = self._ahead.take(extent) if self._ahead is not None else None
        return self._read(extent) if planned is None else planned.result()

    def plan(self, extents: Iterable[Extent]) -> None:
        if self._ahead is None:
            self._ahead = _ReadAhead(self._read, self.stat)
        self._ahead.plan(extents)

    def stat(self, path: str) -> tuple[int, int]:
        place, table = _place(path), self._table.numpy()
        row = table[np.searchsorted(table[:, 0], place).clip(max=len(table) - 1)]
        assert row[0] == place, path
        return int(row[1]), int(row[2])

    def open_shard(self, path: str) -> "AbstractContextManager[RemoteShard]":
        """Open a tar shard to read its headers."""
        return nullcontext(RemoteShard(path, self.stat(path)[0], self._query))

    def _read(self, extent: Extent) -> NDArray[np.uint8]:
        path, offset, size = extent
        whole, version = self.stat(path)
        end = whole if size is None else min(whole, offset + size)
        if end <= offset:
            return np.empty(0, np.uint8)
        entry = f"{path} {version} {offset} {end}"
        data = self.cache.get(entry) if self.cache is not None else None
        if data is None:
            data = fetch(path, offset, end - offset, self._query)
            if self.cache is not None:
                self.cache.put(entry, data)
        return data


def use_local_cache(source: Source, options: StorageOptions) -> None:
    """Keep the images that are read from a URL in the local cache of the options. Raises UserError if it cannot."""
    if isinstance(source, EncodedSource) and isinstance(source.storage, RemoteFiles):
        source.storage.cache = LocalCache.of(options)


class RemoteShard:
    """A tar shard, read in blocks, as one holds the headers of several small members."""

    BLOCK = 4 << 20

    def __init__(self, path: str, size: int, query: str) -> None:
        self.path, self.size, self._query = path, size, query
        self._start, self._block = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes. Raises OSError and UnreachableStorage like `RemoteFiles.read`."""
        end = min(offset + size, self.size)
        if not self._start <= offset <= end <= self._start + len(self._block):
            wanted = min(max(size, self.BLOCK), self.size - offset)
            self._start, self._block = offset, b""
            if wanted > 0:
                self._block = fetch(self.path, offset, wanted, self._query).tobytes()
        return self._block[offset - self._start : max(offset, end) - self._start]


class _ReadAhead:
    """The planned reads: a few are under way or done, and wait in memory until they are taken."""

    def __init__(self, read: Callable[[Extent], NDArray[np.uint8]], stat: Callable[[str], tuple[int, int]]) -> None:
        self._read, self._stat = read, stat
        self._lock = threading.Lock()
        self._waiting: deque[Extent] = deque()
        self._started: dict[Extent, tuple[Future[NDArray[np.uint8]], int]] = {}
        self._bytes = 0  # of those started

    def plan(self, extents: Iterable[Extent]) -> None:
        with self._lock:
            planned = list(dict.fromkeys(extents))
            for extent in self._started.keys() - set(planned):
                self._forget(extent).cancel()
            self._waiting = deque(extent for extent in planned if extent not in self._started)
            self._start()

    def take(self, extent: Extent) -> Future[NDArray[np.uint8]] | None:
        """Return the read of a planned extent. None if it was not planned, not started or already taken."""
        with self._lock:
            future = self._forget(extent) if extent in self._started else None
            if future is None and extent in self._waiting:
                self._waiting.remove(extent)
            self._start()
            return future

    def _forget(self, extent: Extent) -> "Future[NDArray[np.uint8]]":
        future, size = self._started.pop(extent)
        self._bytes -= size
        return future

    def _start(self) -> None:
        while self._waiting and self._bytes < _READ_AHEAD_BYTES:
            extent = self._waiting.popleft()
            path, _, size = extent
            size = self._stat(path)[0] if size is None else size
            self._started[extent] = submit(functools.partial(self._read, extent)), size
            self._bytes += size


def _place(url: str) -> int:
    return int.from_bytes(blake2b(url.encode(errors="surrogateescape"), digest_size=8).digest(), "big", signed=True)


def _size(url: str, info: dict[str, Any]) -> int:
    if info.get("size") is None:
        raise UserError(f"{url}: got no Content-Length from the server, expected a file of known size")
    return int(info["size"])


def _version(info: dict[str, Any]) -> int:
    return _place(" ".join(str(info[name]) for name in _VERSIONS if info.get(name) is not None))
