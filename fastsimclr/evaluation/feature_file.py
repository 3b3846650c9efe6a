"""Features on disk: one matrix, written by all ranks a batch at a time, that is there only once it is whole."""

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
    """A matrix (images, features) float32 on disk, filled by all ranks, each with its rows; it gets its name last.

    Written and not mapped: a full disk is then an error, and not a signal that ends the process, and ranks of two
    machines do not overwrite each other's part of a page.
    """

    def __init__(self, path: Path, source: Source, features: int, said: dict[str, str]) -> None:
        """path: ends in .npy, or in .safetensors, which also holds the labels, if there are any, and what is `said`."""
        self.path, self.partial = path, temporary_path(path)
        self.shape = (len(source), features)
        self._source = source
        self._head = _npy_head(self.shape)
        if path.suffix == ".safetensors":
            self._head = _safetensors_head(self.shape, source.labels, said)

    def create(self) -> None:
        """The first rank's part: all of it but the rows, for which there then is room."""
        size = len(self._head) + 4 * self.shape[0] * self.shape[1]
        with self._its_errors(f"where {size:,} bytes cannot be written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.partial, "wb") as file:
                file.write(self._head)
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not of every file system
                        raise
                    file.truncate(size)

    def fill(self, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Write this rank's rows. Raises UserError if they cannot be, or are no numbers."""
        with open(self.partial, "r+b") as file:
            for index, features, _ in batches:
                first, last = int(index[0]), int(index[-1])
                assert last - first == len(index) - 1, "a rank's part of an unshuffled batch is consecutive"
                bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
                if bad:
                    raise UserError(
                        f"--checkpoint: got features of {self._source.name(first + bad[0])} that are not finite; "
                        "expected numbers: take a checkpoint from before its training diverged"
                    )
                with self._its_errors("which cannot be written"):
                    file.seek(len(self._head) + 4 * self.shape[1] * first)
                    file.write(features.contiguous().numpy().astype("<f4", copy=False).data)
                    file.flush()
            with self._its_errors("which cannot be written"):
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def _its_errors(self, what: str) -> Iterator[None]:
        """An error of the disk is the user's to mend."""
        try:
            yield
        except OSError as error:
            raise UserError(f"--output: got {self.path}, {what} ({error.strerror})") from error

    def publish(self) -> None:
        """All rows are there: give the file its name."""
        rename_atomically(self.partial, self.path)

    def discard(self) -> None:
        """Leave nothing, if it has no name yet."""
        with contextlib.suppress(OSError):
            self.partial.unlink()

    def open(self) -> NDArray[np.float32]:
        """The features, in memory only as far as they are read."""
        return np.memmap(self.path, "<f4", "r", offset=len(self._head), shape=self.shape)


def _npy_head(shape: tuple[int, int]) -> bytes:
    """What a .npy file begins with, before its numbers."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return head.getvalue()


def _safetensors_head(shape: tuple[int, int], labels: NDArray[np.int64], said: dict[str, str]) -> bytes:
    """What a .safetensors file begins with: the length of a JSON text, that, and the labels, if there are any."""
    raw = labels.astype("<i8").tobytes() if (labels != NO_LABEL).any() else b""
    # Its JSON is read as UTF-8, and a path may hold any byte.
    text: dict[str, Any] = {"__metadata__": {key: v.encode(errors="replace").decode() for key, v in said.items()}}
    if raw:
        text["labels"] = {"dtype": "I64", "shape": [len(labels)], "data_offsets": [0, len(raw)]}
    offsets = [len(raw), len(raw) + 4 * shape[0] * shape[1]]
    text["features"] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
    encoded = json.dumps(text).encode()
    encoded += b" " * (-len(encoded) % 8)  # numbers then lie at a multiple of their size
    return struct.pack("<Q", len(encoded)) + encoded + raw


def expect_one_disk(file: Path, world: World) -> None:
    """Raise UserError on all ranks unless they see the same file: rows written to another would be missing."""
    seen = gather_objects((os.stat(file).st_ino, os.stat(file).st_size) if file.exists() else None, world)
    for rank, theirs in enumerate(seen):
        if theirs != seen[0]:
            raise UserError(
                f"--output: got {file.parent}, which is another folder on rank {rank} than on rank 0; expected one "
                "that all ranks share"
            )
