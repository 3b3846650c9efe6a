"""Sources of images: what an image is, where it is stored, and how it is read."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.data.images import decode
from fastsimclr.data.names import Names
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.pixels import RGB8, PixelFormat, default_format
from fastsimclr.data.storage import LOCAL, Extent, Storage
from fastsimclr.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's from Python 3.11

NO_LABEL = -1
_ODD = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: a product with it spreads over all bits
_GONE = "no such file; it was there when the run started"


class WrongForm(UserError):
    """An image or a label of a form that the source cannot have, whatever the number of images that may be bad."""


class Source(ABC):
    """Images with labels.

    labels: (N,) int64, -1 for unlabeled images. classes: names of the classes. pixels: format of the decoded images.
    max_pixels: largest image that is decoded, in pixels.
    scaled_decode: whether large JPEGs may be decoded at a fraction of their size (`PixelOptions`).
    sizes: (N, 2), height and width of each upright image as far as known, otherwise 0; None if none is known. They come
        from an earlier check, so they are only a hint. Workers do not get them.
    bad: the images known to be unusable, by index, and why.
    notes: one line for each kind of file that was passed over when the source was opened, and why; and one if 16-bit
    images become 8-bit RGB.
    """

    labels: NDArray[np.int64]
    classes: Sequence[str]
    pixels: PixelFormat = RGB8
    max_pixels: int = PixelOptions.max_pixels
    scaled_decode: Literal["auto", "off"] = "auto"
    sizes: NDArray[np.int32] | None = None
    bad: Mapping[int, str] = MappingProxyType({})
    notes: Sequence[str] = ()
    thread_safe: ClassVar[bool] = True  # whether threads may read images at the same time
    parallel_reads = 1  # number of threads that must read to hide the latency of storage

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_labels(self) -> bool:
        """Whether all images that are not known to be bad have labels."""
        unlabeled = np.flatnonzero(self.labels == NO_LABEL)
        return len(unlabeled) <= len(self.bad) and all(index in self.bad for index in unlabeled.tolist())

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of image `index` for messages: its file, or its shard and member."""

    def key(self, index: int) -> str:
        """Return the name of image `index` within the source: equal for copies of the data that lie elsewhere."""
        return self.name(index)

    def digest(self) -> bytes:
        """Return a hash of the keys and labels of all images, in their order."""
        hashed = hashlib.blake2b(self._hash_keys(), digest_size=16)
        hashed.update(self.labels.tobytes())
        return hashed.digest()

    def _hash_keys(self) -> bytes:
        return Names.of(map(self.key, range(len(self)))).digest()

    def describe_bad(self) -> list[str]:
        """Return a line for each bad image: its name and the reason."""
        return [f"{self.name(index)}: {reason}" for index, reason in self.bad.items()]

    def class_name(self, label: int) -> str:
        """Return the name of the class. A numeric class is named by its label, as numbers may have gaps."""
        return str(label) if all(name.isdigit() for name in self.classes) else self.classes[label]

    @abstractmethod
    def subset(self, indices: NDArray[np.int64]) -> "Self":
        """Return a source of the images `indices` (K,), in that order. It has the same classes, even unused ones."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sizes": None}

    def _part(self, indices: NDArray[np.int64]) -> "Self":
        """Return a copy with the labels and sizes of the images `indices` (K,), to which `subset` adds the images."""
        part = copy(self)
        part.labels = self.labels[indices]
        part.sizes = None if self.sizes is None else self.sizes[indices]
        if self.bad:
            part.bad = {new: self.bad[old] for new, old in enumerate(indices.tolist()) if old in self.bad}
        return part


class DecodedSource(Source):
    """Images that come decoded."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Return image `index` as (C, H, W), in the format `pixels`. Raises UserError if it cannot be used."""


class ArraySource(DecodedSource):
    """Images of one size in memory: (N, H, W, C)."""

    def __init__(
        self,
        title: str,
        images: Tensor,
        labels: NDArray[np.int64],
        classes: Sequence[str],
        origin: Source | None = None,
    ) -> None:
        """origin: source from which the images were decoded."""
        self.title, self.images, self.labels, self.classes, self.origin = title, images, labels, classes, origin
        self.pixels = default_format(images.shape[3], images.dtype) if origin is None else origin.pixels

    def image(self, index: int) -> Tensor:
        return self.images[index].permute(2, 0, 1)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]" if self.origin is None else self.origin.name(index)

    def key(self, index: int) -> str:
        return super().key(index) if self.origin is None else self.origin.key(index)

    def class_name(self, label: int) -> str:
        return super().class_name(label) if self.origin is None else self.origin.class_name(label)

    def subset(self, indices: NDArray[np.int64]) -> "Self":
        part = self._part(indices)
        part.images = self.images[torch.from_numpy(indices)]
        part.origin = None if self.origin is None else self.origin.subset(indices)
        return part


class EncodedSource(Source):
    """Encoded images in files, of any size. storage: how the files are read."""

    storage: Storage = LOCAL

    @property
    def parallel_reads(self) -> int:  # type: ignore[override]
        return self.storage.parallel_reads

    @abstractmethod
    def extent(self, index: int) -> Extent:
        """Return where the bytes of image `index` are."""

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return the encoded bytes of image `index`. Raises UserError if they cannot be read."""
        path, offset, size = self.extent(index)
        try:
            data = self.storage.read(path, offset, size)
        except OSError as error:
            raise UserError(f"{self.name(index)}: cannot be read ({error.strerror})") from error
        if size is not None and len(data) != size:
            raise UserError(
                f"{self.name(index)}: got {len(data)} of {size} bytes; the shard changed since it was opened"
            )
        return data

    def plan_reads(self, indices: Iterable[int]) -> None:
        """Announce that the images `indices` are read next, in this order: remote storage reads them ahead."""
        self.storage.plan(self.extent(index) for index in indices)

    def key_hashes(self) -> NDArray[np.uint64]:
        """Return a 64-bit hash (N,) of the key of each image; in shards also of its place, as keys may be repeated."""
        return Names.of(map(self.key, range(len(self)))).hashes()

    def keys(self) -> Names:
        """Return the keys of all images."""
        return Names.of(map(self.key, range(len(self))))

    def aligned(self, keys: Names, labels: NDArray[np.int64], classes: Sequence[str]) -> "Self":
        """Return a source of the images `keys` (K,), in that order, with the labels and classes that they had.

        Those that this source lacks are bad. Its other images are left out; `notes` counts them.
        """
        positions: dict[str, list[int]] = {}  # several if shards of the same name have members of the same name
        for index, key in enumerate(self.keys()):
            positions.setdefault(key, []).append(index)
        found = np.array([at.pop(0) if (at := positions.get(key)) else -1 for key in keys], np.int64)
        source = self.subset(np.maximum(found, 0))
        source.labels, source.classes, source.sizes = labels, classes, None
        source._set_keys(keys, found < 0)
        source.bad = {
            new: _GONE if old < 0 else self.bad[old]
            for new, old in enumerate(found.tolist())
            if old < 0 or old in self.bad
        }
        gone = int((found < 0).sum())
        added = len(self) - (len(keys) - gone)
        if gone:
            source.notes = [*source.notes, f"{gone} of the run's {len(keys)} images are gone; others replace them"]
        if added:
            source.notes = [*source.notes, f"{added} images are new since the run started; left out until a new run"]
        return source

    @abstractmethod
    def _set_keys(self, keys: Names, gone: NDArray[np.bool_]) -> None:
        """Set the keys (N,) of the images; those that are `gone` (N,) have been those of others."""

    @abstractmethod
    def locations(self) -> tuple[Sequence[str], NDArray[np.int64], NDArray[np.int64]]:
        """Return the files, and for each image (N,) the index of its file and its byte offset in it."""


class FolderSource(EncodedSource):
    """Image files in a folder or in its class folders."""

    def __init__(
        self, names: Names | Sequence[str], labels: NDArray[np.int64], classes: Sequence[str], root: str = ""
    ) -> None:
        """names: of the files, relative to the folder `root`."""
        self.names = names if isinstance(names, Names) else Names.of(names)
        self.labels, self.classes, self.root = labels, classes, root

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def key(self, index: int) -> str:
        return self.names[index]

    def key_hashes(self) -> NDArray[np.uint64]:
        return self.names.hashes()

    def keys(self) -> Names:
        return self.names

    def _set_keys(self, keys: Names, gone: NDArray[np.bool_]) -> None:
        self.names = keys

    def _hash_keys(self) -> bytes:
        return self.names.digest()

    def extent(self, index: int) -> Extent:
        return self.name(index), 0, None

    def locations(self) -> tuple[Sequence[str], NDArray[np.int64], NDArray[np.int64]]:
        return [self.name(index) for index in range(len(self))], np.arange(len(self)), np.zeros(len(self), np.int64)

    def class_name(self, label: int) -> str:
        return self.classes[label]

    def subset(self, indices: NDArray[np.int64]) -> "Self":
        part = self._part(indices)
        part.names = self.names[indices]
        return part


class TarSource(EncodedSource):
    """Images in uncompressed tar shards, read at the byte offsets of their members.

    classes_are_names: whether `classes` has a name for each label; else it has the labels that occur, as numbers.
    """

    classes_are_names: bool = False

    def __init__(
        self,
        shards: Sequence[str],
        members: Names | Sequence[str],
        extents: NDArray[np.int64],
        labels: NDArray[np.int64],
        classes: Sequence[str],
    ) -> None:
        self.members = members if isinstance(members, Names) else Names.of(members)
        self.shards, self.labels, self.classes = shards, labels, classes
        self.extents = extents  # (N, 3): shard, offset, size

    def name(self, index: int) -> str:
        return f"{self.shards[self.extents[index, 0]]}: {self.members[index]}"

    def key(self, index: int) -> str:
        return f"{os.path.basename(self.shards[self.extents[index, 0]])}: {self.members[index]}"

    def key_hashes(self) -> NDArray[np.uint64]:
        shards = Names.of(map(os.path.basename, self.shards)).hashes()
        places = shards[self.extents[:, 0]] + self.extents[:, 1].astype(np.uint64)
        return self.members.hashes() ^ (places * np.uint64(_ODD))  # equal members of two shards differ

    def _set_keys(self, keys: Names, gone: NDArray[np.bool_]) -> None:
        members, shards = list(self.members), list(self.shards)
        for index in np.flatnonzero(gone).tolist():
            name, _, members[index] = keys[index].rpartition(": ")
            numbers = [number for number, shard in enumerate(shards) if os.path.basename(shard) == name]
            if not numbers:
                shards.append(name)
            self.extents[index] = numbers[0] if numbers else len(shards) - 1, 0, 0
        self.members, self.shards = Names.of(members), shards

    def _hash_keys(self) -> bytes:
        shards = Names.of(map(os.path.basename, self.shards)).digest()
        return shards + self.members.digest() + self.extents[:, 0].tobytes()

    def extent(self, index: int) -> Extent:
        shard, offset, size = self.extents[index].tolist()
        return self.shards[shard], offset, size

    def class_name(self, label: int) -> str:
        return self.classes[label] if self.classes_are_names else super().class_name(label)

    def locations(self) -> tuple[Sequence[str], NDArray[np.int64], NDArray[np.int64]]:
        return self.shards, self.extents[:, 0], self.extents[:, 1]

    def subset(self, indices: NDArray[np.int64]) -> "Self":
        part = self._part(indices)
        part.members, part.extents = self.members[indices], self.extents[indices]
        return part


def decoded(source: Source, index: int) -> Tensor:
    """Return image `index` as (C, H, W), in the format `source.pixels`.

    Raises UserError if it cannot be used, and WrongForm if the image of an array or Dataset has another format.
    """
    if isinstance(source, DecodedSource):
        image = source.image(index)
        try:
            source.pixels.check(image, source.name(index))
        except UserError as error:
            raise WrongForm(str(error)) from error
        return image
    assert isinstance(source, EncodedSource)
    return decode(source.read(index), source.name(index), source.pixels, source.max_pixels)


def reason_of(error: object, source: Source, index: int) -> str:
    """Return why image `index` is bad: an error's message without the image's name and what was expected."""
    reason, _, _ = str(error).removeprefix(f"{source.name(index)}: ").partition("; expected")
    return reason
