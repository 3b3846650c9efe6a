"""Sources of images: class folders, a flat folder, WebDataset tar shards, and built-in datasets.

a folder of class folders    train/daisy/1.jpg               label: index of the class folder in sorted order
a flat folder of images      photos/1.jpg                    no labels
tar shards                   'train-{000..127}.tar', '*.tar' label: NAME.cls beside NAME.jpg, else NAME's folder
digits                       scikit-learn's 1,797 handwritten digits, 80 % of each class for training
cifar10[:ROOT]               CIFAR-10 through torchvision, from ROOT or downloaded to it
stl10[:ROOT]                 STL-10 likewise; most of its 105,000 training images are unlabeled
"""

import glob
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastsimclr.data.images import EXTENSIONS
from fastsimclr.data.pixels import RGB8, PixelFormat, default_format
from fastsimclr.errors import UserError

Files = TypeVar("Files", bound="EncodedSource")
BUILT_IN = ("digits", "cifar10", "stl10")
NO_LABEL = -1
_OBJECT = "object:"
_EXPECTED = "a folder of images, tar shards, digits, cifar10[:ROOT] or stl10[:ROOT]"


class Source(ABC):
    """Images with labels.

    labels: (N,) int64, -1 for unlabeled images. classes: names of the classes. pixels: format of the decoded images.
    """

    labels: NDArray[np.int64]
    classes: Sequence[str]
    pixels: PixelFormat = RGB8

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_labels(self) -> bool:
        return bool((self.labels != NO_LABEL).all())

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of image `index` for messages: its file, or its shard and member."""

    def class_name(self, label: int) -> str:
        """Return the name of the class with this label."""
        return self.classes[label]

    @abstractmethod
    def subset(self, indices: NDArray[np.int64]) -> "Source":
        """Return a source of the images `indices` (K,), in that order. It has the same classes, even unused ones."""


class DecodedSource(Source):
    """Images that come decoded."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Return image `index` as (C, H, W), in the format `pixels`. Raises UserError if it cannot be used."""

    @abstractmethod
    def subset(self, indices: NDArray[np.int64]) -> "DecodedSource": ...


class ArraySource(DecodedSource):
    """Images of one size in memory: (N, H, W, C)."""

    def __init__(
        self,
        title: str,
        images: Tensor,
        labels: NDArray[np.int64],
        classes: Sequence[str],
        origin: "EncodedSource | None" = None,
    ) -> None:
        """origin: source of the files from which the images were decoded."""
        self.title, self.images, self.labels, self.classes, self.origin = title, images, labels, classes, origin
        self.pixels = default_format(images.shape[3], images.dtype) if origin is None else origin.pixels

    def image(self, index: int) -> Tensor:
        return self.images[index].permute(2, 0, 1)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]" if self.origin is None else self.origin.name(index)

    def class_name(self, label: int) -> str:
        return super().class_name(label) if self.origin is None else self.origin.class_name(label)

    def subset(self, indices: NDArray[np.int64]) -> "ArraySource":
        part = copy(self)
        part.images, part.labels = self.images[torch.from_numpy(indices)], self.labels[indices]
        part.origin = None if self.origin is None else self.origin.subset(indices)
        return part


class EncodedSource(Source):
    """Encoded images on disk, of any size."""

    sizes: NDArray[np.int64] | None = None
    """(N, 2): height and width of each upright image; None if not scanned (fastsimclr/data/scan.py)."""

    @abstractmethod
    def read(self, index: int) -> NDArray[np.uint8]:
        """Return the encoded bytes of image `index`. Raises UserError if they cannot be read."""

    @abstractmethod
    def locations(self) -> tuple[Sequence[str] | NDArray[np.str_], NDArray[np.int64], NDArray[np.int64]]:
        """Return the files, and for each image (N,) the index of its file and its byte offset in it."""

    @abstractmethod
    def subset(self, indices: NDArray[np.int64]) -> "EncodedSource": ...


class FolderSource(EncodedSource):
    """Image files in a folder or in its class folders."""

    def __init__(
        self, files: Sequence[str] | NDArray[np.str_], labels: NDArray[np.int64], classes: Sequence[str]
    ) -> None:
        self.files, self.labels, self.classes = (
            np.array(files),
            labels,
            classes,
        )  # an array: pickled as one buffer for workers

    def name(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int) -> NDArray[np.uint8]:
        try:
            return np.fromfile(self.files[index], dtype=np.uint8)
        except OSError as error:
            raise UserError(f"{self.name(index)}: cannot be read ({error.strerror}); expected an image file") from error

    def locations(self) -> tuple[NDArray[np.str_], NDArray[np.int64], NDArray[np.int64]]:
        return self.files, np.arange(len(self)), np.zeros(len(self), np.int64)

    def subset(self, indices: NDArray[np.int64]) -> "FolderSource":
        part = copy(self)
        part.files, part.labels = self.files[indices], self.labels[indices]
        part.sizes = None if self.sizes is None else self.sizes[indices]
        return part


class TarSource(EncodedSource):
    """Images in uncompressed tar shards, read at the byte offsets of their members."""

    def __init__(
        self,
        shards: Sequence[str],
        members: Sequence[str] | NDArray[np.str_],
        extents: NDArray[np.int64],
        labels: NDArray[np.int64],
        classes: Sequence[str],
    ) -> None:
        self.shards, self.members, self.labels, self.classes = shards, np.array(members), labels, classes
        self.extents = extents  # (N, 3): shard, offset, size

    def name(self, index: int) -> str:
        return f"{self.shards[self.extents[index, 0]]}: {self.members[index]}"

    def read(self, index: int) -> NDArray[np.uint8]:
        shard, offset, size = self.extents[index]
        try:
            data = np.fromfile(self.shards[shard], dtype=np.uint8, count=size, offset=offset)
        except OSError as error:
            raise UserError(f"{self.name(index)}: cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise UserError(
                f"{self.name(index)}: got {len(data)} of {size} bytes; the shard changed since it was opened"
            )
        return data

    def locations(self) -> tuple[Sequence[str], NDArray[np.int64], NDArray[np.int64]]:
        return self.shards, self.extents[:, 0], self.extents[:, 1]

    def class_name(self, label: int) -> str:
        """Return the name of the class. A numeric class is named by its label, as numbers may have gaps."""
        return str(label) if all(name.isdigit() for name in self.classes) else self.classes[label]

    def subset(self, indices: NDArray[np.int64]) -> "TarSource":
        part = copy(self)
        part.members, part.extents, part.labels = self.members[indices], self.extents[indices], self.labels[indices]
        part.sizes = None if self.sizes is None else self.sizes[indices]
        return part


def open_source(data: Any, *, split: str = "train") -> Source:
    """Open images. Raises UserError if they do not exist or have another form.

    data: a path in any of the forms above, or a Source. split: "train" or "val", for built-in datasets only.
    """
    assert split in ("train", "val"), split
    if isinstance(data, Source):
        return data
    path = os.fspath(data)
    if path.startswith(_OBJECT):
        raise UserError(
            f"{path.removeprefix(_OBJECT)}: got the name of an object that a Python program passed to pretrain(), "
            f"expected {_EXPECTED}: pass the images again, or --data.train on the command line"
        )
    kind, _, root = path.partition(":")
    if path == "digits":
        return _digits(split)
    if kind in ("cifar10", "stl10"):
        return _from_torchvision(kind, os.path.expanduser(root) or "data", split)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.endswith(".tar") or any(c in path for c in "{*?["):
            return _open_tars(_expand(path))
        got = "a file" if folder.exists() else "nothing at that path"
        raise UserError(f"{path}: got {got}, expected {_EXPECTED}")
    return _open_folder(folder)


def describe(data: Any) -> str:
    """Return the path of images, or for an object a name that `open_source` does not open, for the record of a run."""
    return os.fspath(data) if isinstance(data, str | os.PathLike) else f"{_OBJECT}{type(data).__name__}"


def _open_folder(folder: Path) -> FolderSource:
    flat = sorted(entry.path for entry in os.scandir(folder) if entry.is_file() and _is_image(entry.name))
    flat = [flat[n] for n in _images_of(flat)]
    if flat:
        return FolderSource(flat, np.full(len(flat), NO_LABEL), ())
    files: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    for class_folder in sorted(entry.path for entry in os.scandir(folder) if entry.is_dir()):
        images = sorted(
            os.path.join(parent, file)
            for parent, _, names in os.walk(class_folder, followlinks=True)
            for file in names
            if _is_image(file)
        )
        if images:
            files += images
            labels += [len(classes)] * len(images)
            classes.append(os.path.basename(class_folder))
    if not files:
        raise UserError(
            f"{folder}: got a folder with no images in it or its subfolders, expected files ending in "
            f"{' '.join(EXTENSIONS)}"
        )
    return _selected(FolderSource(files, np.array(labels), classes), files)


def _open_tars(shards: list[str]) -> TarSource:
    members: list[str] = []
    extents: list[tuple[int, int, int]] = []
    class_names: list[str] = []  # of each image: the text of NAME.cls, or its folder
    for shard_index, shard in enumerate(shards):
        found, texts = _scan_tar(shard)
        for member, offset, size in found:
            stem = _stem(member)
            members.append(member)
            extents.append((shard_index, offset, size))
            class_names.append(texts.get(stem, os.path.basename(os.path.dirname(stem))))
    if not members:
        raise UserError(f"{shards[0]}: got no images in {len(shards)} shards, expected members such as 0001.jpg")
    if not all(class_names):
        return _selected(TarSource(shards, members, np.array(extents), np.full(len(members), NO_LABEL), ()), members)
    numeric = all(name.isascii() and name.isdigit() for name in class_names)
    classes = sorted(set(class_names), key=int if numeric else None)
    labels = np.array([int(name) for name in class_names] if numeric else np.searchsorted(classes, class_names))
    return _selected(TarSource(shards, members, np.array(extents), labels, classes), members)


def _scan_tar(shard: str) -> tuple[list[tuple[str, int, int]], dict[str, str]]:
    """Return the image members of a tar as (name, offset, size), and the text of its NAME.cls members by NAME."""
    images: list[tuple[str, int, int]] = []
    texts: dict[str, str] = {}
    try:
        with tarfile.open(shard, mode="r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not member.isfile():
                    continue
                if _is_image(member.name):
                    images.append((member.name, member.offset_data, member.size))
                elif member.name.endswith(".cls"):
                    content = tar.extractfile(member)
                    assert content is not None  # it is a regular file
                    texts[_stem(member.name)] = content.read().decode().strip()
        with open(shard, "rb") as file:  # tarfile treats a damaged or missing header as the end
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither a header nor the end marker at byte {end}")
    except FileNotFoundError as error:
        raise UserError(f"{shard}: got no such file, expected a tar shard") from error
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(
            f"{shard}: got a truncated or damaged tar ({error}), expected a complete, uncompressed one: "
            "download or write it again"
        ) from error
    return images, texts


def _expand(pattern: str) -> list[str]:
    """Return the files that match a pattern with brace ranges ({000..127}) and globs (* ? [])."""
    brace = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if brace:
        first, last = brace.groups()
        if int(first) > int(last):
            raise UserError(f"{pattern}: got a range from {first} down to {last}, expected {{{last}..{first}}}")
        width = len(first) if first.startswith("0") else 0
        numbers = [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]
        return [file for n in numbers for file in _expand(pattern[: brace.start()] + n + pattern[brace.end() :])]
    pattern = os.path.expanduser(pattern)
    if not any(c in pattern for c in "*?["):
        return [pattern]
    found = sorted(glob.glob(pattern))
    if not found:
        raise UserError(f"{pattern}: got no file that matches, expected tar shards")
    return found


def _stem(member: str) -> str:
    """Return WebDataset's sample key: the name up to the first dot after the last slash."""
    folder, slash, file = member.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _images_of(names: Sequence[str]) -> list[int]:
    """Return the positions of the images. Beside other images, .npy files hold something else, such as features."""
    others = [n for n, name in enumerate(names) if not name.lower().endswith(".npy")]
    return others or list(range(len(names)))


def _selected(source: Files, names: Sequence[str]) -> Files:
    kept = _images_of(names)
    return source if len(kept) == len(names) else source.subset(np.array(kept))  # type: ignore[return-value]


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


def _digits(split: str) -> ArraySource:
    """Open 8x8 handwritten digits, resized to 32x32 RGB. Every fifth image of each class is held out for "val"."""
    from sklearn.datasets import load_digits  # lazy: the import takes a second

    data = load_digits()
    labels = data.target.astype(np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        held_out[np.flatnonzero(labels == label)[::5]] = True
    resized = [
        np.asarray(Image.fromarray(digit).resize((32, 32), Image.Resampling.BICUBIC))
        for digit in np.rint(data.images * (255 / 16)).astype(np.uint8)
    ]
    selected = held_out if split == "val" else ~held_out
    images = torch.from_numpy(np.stack(resized)[selected])[..., None].repeat(1, 1, 1, 3)
    return ArraySource("digits", images, labels[selected], [str(d) for d in range(10)])


def _from_torchvision(name: str, root: str, split: str) -> ArraySource:
    from torchvision.datasets import CIFAR10, STL10  # lazy: the import is slow

    try:  # downloads only missing files
        if name == "cifar10":
            cifar = CIFAR10(root, train=split == "train", download=True)
            return ArraySource(name, torch.from_numpy(cifar.data), np.array(cifar.targets), cifar.classes)
        stl = STL10(root, split="train+unlabeled" if split == "train" else "test", download=True)
    except Exception as error:  # network and disk errors of many kinds
        title, folder = ("CIFAR-10", "cifar-10-batches-py") if name == "cifar10" else ("STL-10", "stl10_binary")
        raise UserError(
            f"{name}:{root}: got no {title} in that folder and could not download it ({str(error).splitlines()[0]}); "
            f"expected {folder} in it"
        ) from error
    images = torch.from_numpy(stl.data).permute(0, 2, 3, 1).contiguous()
    return ArraySource(name, images, stl.labels.astype(np.int64), stl.classes)
