"""The names of images, kept as bytes: a million strings would take some 100 MiB in each process."""

import hashlib
import itertools
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_AT_ONCE = 1 << 16  # bounds the memory of their digests, and of their ends as Python's integers


class Names:
    """An immutable list of file names: names[i] is a str, names[indices (K,)] the Names of these, in that order.

    Workers get handles to the two tensors, which then are in shared memory. Bytes that are not UTF-8 become surrogate
    escapes, as everywhere in Python.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        """text: all names one after another. ends: (N,), the end of each name in it."""
        self._text: Tensor = torch.from_numpy(text)
        self._ends: Tensor = torch.from_numpy(ends)

    @staticmethod
    def of(names: Iterable[str | bytes]) -> "Names":
        text, ends = bytearray(), array("q")  # which grow: no list of a million names is made
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        return Names(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))

    @staticmethod
    def join(parts: Sequence["Names"]) -> "Names":
        starts = np.cumsum([0, *(len(part._text) for part in parts)])
        ends = [part._ends.numpy() + start for part, start in zip(parts, starts, strict=False)]
        return Names(np.concatenate([part._text.numpy() for part in parts]), np.concatenate(ends))

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the text and the ends, as `Names` takes them."""
        return self._text.numpy(), self._ends.numpy()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: NDArray[np.int64]) -> "Names": ...
    def __getitem__(self, index: int | NDArray[np.int64]) -> "str | Names":
        text, ends = self._text.numpy(), self._ends.numpy()
        if not isinstance(index, np.ndarray):
            index = range(len(ends))[index]  # checks it, and counts a negative one from the end
            return os.fsdecode(text[0 if index == 0 else ends[index - 1] : ends[index]].tobytes())
        starts = np.concatenate([[0], ends])[:-1]
        lengths = (ends - starts)[index]
        new_ends = np.cumsum(lengths)
        positions = np.arange(lengths.sum()) + np.repeat(starts[index] - (new_ends - lengths), lengths)
        return Names(text[positions], new_ends)

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self._iter_bytes())

    def _iter_bytes(self) -> Iterator[bytes]:
        text, ends = self._text.numpy().data, self._ends.numpy()
        start = 0
        for first in range(0, len(ends), _AT_ONCE):
            for end in ends[first : first + _AT_ONCE].tolist():
                yield bytes(text[start:end])
                start = end

    def hashes(self) -> NDArray[np.uint64]:
        """Return a 64-bit hash of each name (N,)."""
        hashed = np.empty(len(self), np.uint64)
        names = self._iter_bytes()
        for first in range(0, len(self), _AT_ONCE):
            part = itertools.islice(names, _AT_ONCE)
            digests = b"".join([hashlib.blake2b(name, digest_size=8).digest() for name in part])
            hashed[first : first + _AT_ONCE] = np.frombuffer(digests, "<u8")
        return hashed

    def digest(self) -> bytes:
        """Return a hash of the names and their order."""
        hashed = hashlib.blake2b(self._ends.numpy().data, digest_size=16)
        hashed.update(self._text.numpy().data)
        return hashed.digest()


def printable(name: str | bytes) -> str:
    """Return a name for a message of one line: line breaks and bytes that are not UTF-8 as escapes."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], text)
