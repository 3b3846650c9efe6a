"""A file of features, which all ranks write batch by batch and which appears only once it is complete."""

import contextlib
import errno
import io
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.data import Source
from fastsimclr.data.sources import NO_LABEL
from fastsimclr.distributed import World, gather_objects
from fastsimclr.errors import UserError
from fastsimclr.run_folder import rename_atomically, temporary_path


class FeatureFile:
    """A matrix (images, features) float32 on disk. Every rank writes its rows; `publish` gives the file its name.

    Rows are written, not memory-mapped: a full disk then raises an error instead of killing the process (SIGBUS), and
    ranks on different machines do not overwrite each other's part of a page.
    """

    def __init__(self, path: Path, source: Source, features: int, metadata: dict[str, str]) -> None:
        """path: ends in .npy, or in .safetensors, which also holds the labels, if any, and `metadata`."""
        self.path, self.partial = path, temporary_path(path)
        self.shape = (len(source), features)
        self._source, self._metadata = source, metadata
        self._head = self._make_head()

    def _make_head(self) -> bytes:
        if self.path.suffix == ".safetensors":
            return _safetensors_head(self.shape, self._source.labels, self._metadata)
        return _npy_head(self.shape)

    def create(self) -> None:
        """Create the file on the first rank: its header, and space reserved for all rows."""
        size = len(self._head) + 4 * self.shape[0] * self.shape[1]
        with self._disk_errors(f"where {size:,} bytes cannot be written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.partial, "wb") as file:
                file.write(self._head)
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not supported by the file system
                        raise
                    file.truncate(size)

    def fill(self, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Write this rank's rows. Raises UserError if they cannot be written or are not finite."""
        with open(self.partial, "r+b") as file:
            for index, features, _ in batches:
                not_finite = index[~features.isfinite().all(dim=1)].tolist()
                if not_finite:
                    raise UserError(
                        f"--checkpoint: got features of {self._source.name(not_finite[0])} that are not finite; "
                        "expected finite ones: use a checkpoint from before training diverged"
                    )
                images, rows = index.numpy(), features.contiguous().numpy().astype("<f4", copy=False)
                gaps = np.flatnonzero(np.diff(images) != 1) + 1  # at images that were left out
                with self._disk_errors("which cannot be written"):
                    for numbers, part in zip(np.split(images, gaps), np.split(rows, gaps), strict=True):
                        if len(numbers):
                            file.seek(self._offset(int(numbers[0])))
                            file.write(part.data)
                    file.flush()
            with self._disk_errors("which cannot be written"):
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        """Report an OSError as a user error of --output."""
        try:
            yield
        except OSError as error:
            raise UserError(f"--output: got {self.path}, {what} ({error.strerror})") from error

    def keep(self, rows: NDArray[np.int64], source: Source) -> None:
        """Keep only the rows (K,), in ascending order. source: their images."""
        old = [self._offset(row) for row in rows.tolist()]
        self.shape, self._source = (len(rows), self.shape[1]), source
        self._head = self._make_head()
        with self._disk_errors("which cannot be written"), open(self.partial, "r+b") as file:
            for row, offset in enumerate(old):  # forward, as the head does not grow
                if offset != self._offset(row):
                    file.seek(offset)
                    values = file.read(4 * self.shape[1])
                    file.seek(self._offset(row))
                    file.write(values)
            file.truncate(self._offset(len(rows)))
            file.seek(0)
            file.write(self._head)
            file.flush()
            os.fsync(file.fileno())

    def _offset(self, row: int) -> int:
        return len(self._head) + 4 * self.shape[1] * row

    def publish(self) -> None:
        """Give the complete file its name."""
        rename_atomically(self.partial, self.path)

    def discard(self) -> None:
        """Delete the partial file, if it was not published."""
        with contextlib.suppress(OSError):
            self.partial.unlink()

    def open(self) -> NDArray[np.float32]:
        """Return the features, memory-mapped."""
        return np.memmap(self.path, "<f4", "r", offset=len(self._head), shape=self.shape)


def _npy_head(shape: tuple[int, int]) -> bytes:
    """The header of a .npy file."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return head.getvalue()


def _safetensors_head(shape: tuple[int, int], labels: NDArray[np.int64], metadata: dict[str, str]) -> bytes:
    """The start of a .safetensors file: the length of the JSON header, the header, and the labels, if any."""
    raw = labels.astype("<i8").tobytes() if (labels != NO_LABEL).any() else b""
    # The header is UTF-8, but a path may hold any bytes.
    text: dict[str, Any] = {"__metadata__": {key: v.encode(errors="replace").decode() for key, v in metadata.items()}}
    if raw:
        text["labels"] = {"dtype": "I64", "shape": [len(labels)], "data_offsets": [0, len(raw)]}
    offsets = [len(raw), len(raw) + 4 * shape[0] * shape[1]]
    text["features"] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
    encoded = json.dumps(text).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the tensors
    return struct.pack("<Q", len(encoded)) + encoded + raw


def expect_one_disk(file: Path, world: World) -> None:
    """Raise UserError on all ranks unless they see the same file: rows written to another file would be missing."""
    seen = gather_objects((os.stat(file).st_ino, os.stat(file).st_size) if file.exists() else None, world)
    for rank, theirs in enumerate(seen):
        if theirs != seen[0]:
            raise UserError(
                f"--output: got {file.parent}, which is not the same folder on rank {rank} as on rank 0; expected a "
                "folder that all ranks share"
            )
