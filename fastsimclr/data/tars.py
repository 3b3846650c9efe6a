"""Open tar shards: which files a pattern means, which members are images, and what their labels are.

images    members with the endings of images, in the order of the shards. Not hidden ones: ._1.jpg, @eaDir/.
key       WebDataset's: the name up to the first dot after the last slash. 0.seg.png beside 0.jpg is a mask, no image;
          where there is no plain image of that key, as in 0.left.jpg and 0.right.jpg, all are images.
labels    see `tar_labels`.
"""

import functools
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.folders import SYSTEM_FOLDERS
from fastsimclr.data.images import EXTENSIONS
from fastsimclr.data.names import Names, printable
from fastsimclr.data.remote_requests import list_files
from fastsimclr.data.sources import NO_LABEL, TarSource
from fastsimclr.data.tar_headers import Archive, DamagedTar, ReadableFile, read_archives
from fastsimclr.data.tar_index import INDEX_FILE, MIN_IMAGES, index_file, load_index, save_index, stamps_of
from fastsimclr.data.tar_labels import (
    CLASSES_FILE,
    LABEL_ENDINGS,
    label_of,
    labels_by_folder,
    number_classes,
    read_label,
)
from fastsimclr.data.urls import is_pattern, is_url
from fastsimclr.errors import UserError

_ENDINGS = tuple(ending.encode() for ending in EXTENSIONS)
_ARRAYS = (b".npy", b".NPY")
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_HIDDEN = re.compile(rb"(?:^|/)(?:\.(?!\.?/)|(?:%s)/)" % b"|".join(map(re.escape, SYSTEM_FOLDERS)))
_THREADS = 16  # their reads overlap; the headers are read under the GIL

OpenShard = Callable[[str], AbstractContextManager[ReadableFile]]


class LocalShard:
    """A shard on disk."""

    def __init__(self, path: str) -> None:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(
                f"{path}: got a {'folder' if stat.S_ISDIR(status.st_mode) else 'device or pipe'}, expected a tar shard"
            )
        self.size = status.st_size
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass
class Shard:
    """The images of a shard. labels: (N,), their positions in `texts`. extents: (N, 2), byte offset and size."""

    names: Names
    extents: NDArray[np.int64]
    labels: NDArray[np.int64]
    texts: list[str | None]
    arrays: list[int]
    """Indices of the .npy files. Beside other images they hold something else, such as features."""
    notes: "Notes"


class Notes:
    """Counts what was passed over, by reason, with the first name of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, count: int, name: str) -> None:
        if count:
            self.counts[reason] += count
            self._first.setdefault(reason, name)

    def merge(self, other: "Notes") -> None:
        for reason, count in other.counts.items():
            self.add(reason, count, other._first[reason])

    def lines(self) -> list[str]:
        """Return one line per reason."""
        return [
            f"{reason}: {count:,} (first: {printable(self._first[reason])})" for reason, count in self.counts.items()
        ]


def is_tar_path(path: str) -> bool:
    """Return whether `path` means tar shards: by its ending, or as a pattern."""
    return path.endswith((".tar", ".tgz", ".parquet")) or ".tar." in os.path.basename(path) or is_pattern(path)


def expand(pattern: str) -> list[str]:
    """Return the files that a pattern with braces ({000..127}, {a,b}) and globs (* ? []) means.

    A file of exactly that name wins, as does a folder. Raises UserError if no file matches a glob.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):
        return [pattern]
    braces = _BRACES.search(pattern)
    if braces:
        files = [
            file
            for part in _alternatives(braces)
            for file in expand(pattern[: braces.start()] + part + pattern[braces.end() :])
        ]
        return list(dict.fromkeys(files))
    if is_url(pattern):
        return list(list_files(pattern)) if is_pattern(pattern) else [pattern]
    if not glob.has_magic(pattern):
        return [pattern]
    folder, name = os.path.split(pattern)
    if os.path.isdir(folder):
        pattern = os.path.join(glob.escape(folder), name)
    found = sorted(glob.glob(pattern))
    if not found:
        raise UserError(f"{pattern}: got no file that matches, expected tar shards")
    return found


def _alternatives(braces: "re.Match[str]") -> Iterable[str]:
    first, last, listed = braces.groups()
    if listed is not None:
        return str(listed).split(",")
    if int(first) > int(last):
        raise UserError(f"{braces.string}: got a range from {first} down to {last}, expected {{{last}..{first}}}")
    width = len(first) if first.startswith("0") else 0
    return (f"{n:0{width}d}" for n in range(int(first), int(last) + 1))


def open_tars(shards: Sequence[str], cache: Path) -> TarSource:
    """Open tar shards on disk, from their index if they have not changed. Raises UserError.

    The index is beside the shards, as fastsimclr shard writes it, or in the folder `cache`, where this one writes it.
    """
    classes = Path(shards[0]).with_name(CLASSES_FILE)
    try:
        stamps = stamps_of([*shards, *([str(classes)] if classes.is_file() else [])])
    except OSError as error:
        raise _unreadable(str(error.filename), error) from error
    beside = load_index(classes.with_name(INDEX_FILE), shards, stamps)
    return beside or open_indexed(shards, stamps, cache, lambda: read_local_shards(shards))


def open_indexed(
    shards: Sequence[str], stamps: Sequence[tuple[int, int]], cache: Path, read: Callable[[], TarSource]
) -> TarSource:
    """Open tar shards from their index in the folder `cache`; if there is none of these stamps, read them and write it.

    stamps: two numbers per file that change with its content.
    """
    file = index_file(cache, shards)
    source = load_index(file, shards, stamps)
    if source is None:
        source = read()
        if len(source) >= MIN_IMAGES or is_url(shards[0]):
            save_index(file, source, stamps)
    return source


def read_local_shards(shards: Sequence[str]) -> TarSource:
    return read_shards(shards, lambda path: closing(LocalShard(path)))


def read_shards(shards: Sequence[str], open_shard: OpenShard) -> TarSource:
    """Find the images of tar shards. Raises UserError if one cannot be read, is no complete tar, or none has images."""
    with ThreadPoolExecutor(min(_THREADS, len(shards))) as threads:
        parts = list(threads.map(lambda path: read_shard(path, open_shard), shards))
    if not any(len(part.names) for part in parts):
        raise UserError(f"{shards[0]}: got no images in {len(shards)} shards, expected members such as 0001.jpg")
    notes = Notes()
    for part in parts:
        notes.merge(part.notes)
    labels, classes, are_names = _label(shards, parts, notes)
    counts = [len(part.names) for part in parts]
    extents = np.concatenate([part.extents for part in parts])
    extents = np.column_stack([np.repeat(np.arange(len(shards)), counts), extents])
    source = TarSource(shards, Names.join([part.names for part in parts]), extents, labels, classes)
    source.classes_are_names = are_names
    arrays = np.concatenate(
        [start + np.array(part.arrays, np.int64) for start, part in zip(np.cumsum([0, *counts]), parts, strict=False)]
    )
    if 0 < len(arrays) < len(source):
        notes.add(".npy files beside images passed over", len(arrays), source.name(int(arrays[0])))
        source = source.subset(np.delete(np.arange(len(source)), arrays))
    source.notes = notes.lines()
    return source


def _label(shards: Sequence[str], parts: Sequence[Shard], notes: Notes) -> tuple[NDArray[np.int64], list[str], bool]:
    """Return the labels of the images (N,), by labels in the shards or else by folders, and the classes.

    The last value is that of `TarSource.classes_are_names`.
    """
    missing = "images without a label in a .cls or .json, unlike others"
    texts = {text for part in parts for text in part.texts} - {None}
    if not texts:
        missing = "images in no folder and so without a label, unlike others"
        parts = [_labeled_by_folder(part) for part in parts]
        texts = {text for part in parts for text in part.texts} - {None}
        if len(texts) == 1:  # photos/0.jpg, photos/1.jpg, …: the folder that was packed
            texts = set()
    values, classes, are_names = number_classes([text for text in texts if text is not None], shards)
    labels = [np.array([values.get(text, NO_LABEL) for text in part.texts], np.int64)[part.labels] for part in parts]
    if texts:
        for path, part in zip(shards, parts, strict=True):
            if None in part.texts:
                unlabeled = np.flatnonzero(part.labels == part.texts.index(None))
                notes.add(missing, len(unlabeled), f"{path}: {part.names[int(unlabeled[0])]}")
    return np.concatenate(labels), classes, are_names


def _labeled_by_folder(part: Shard) -> Shard:
    labels, texts = labels_by_folder(part.names)
    return replace(part, labels=labels, texts=texts)


def read_shard(path: str, open_shard: OpenShard) -> Shard:
    """Find the images of one shard. Raises UserError."""
    try:
        with open_shard(path) as file:
            try:
                return _lay_out(path, read_archives(file, LABEL_ENDINGS, functools.partial(read_label, path)))
            except DamagedTar as error:
                raise _explain(path, file.read(0, 8), error) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> UserError:
    reason = "got no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return UserError(f"{path}: {reason}, expected a tar shard")


def _lay_out(path: str, archives: Iterable[Archive]) -> Shard:
    """Return the images of a shard's archives, each with its label."""
    notes = Notes()
    names: list[bytes] = []
    extents: list[tuple[int, int]] = []
    labels: list[int] = []
    texts: dict[str | None, int] = {}

    def pass_over(reason: str, members: Sequence[bytes]) -> None:
        notes.add(reason, len(members), f"{path}: {os.fsdecode(members[0])}" if members else "")

    for archive in archives:
        pass_over("links to no file of their shard passed over", [*filter(_is_image, archive.dead_links)])
        pass_over("sparse files passed over", [*filter(_is_image, archive.sparse)])
        images = [member for member in archive.members if _is_image(member[0])]
        hidden = [name for name, _, _ in images if _HIDDEN.search(name)]
        pass_over("hidden images passed over", hidden)
        passed = set(hidden)
        dotted = {name for name, _, _ in images if name.count(b".", name.rfind(b"/") + 1) > 1} - passed
        if dotted:
            plain = {_key(name) for name, _, _ in images if name not in dotted and name not in passed}
            masks = [name for name, _, _ in images if name in dotted and _key(name) in plain]
            pass_over("masks such as 0.seg.png beside 0.jpg passed over", masks)
            passed.update(masks)
        for name, offset, size in images:
            if name in passed:
                continue
            names.append(name)
            extents.append((offset, size))
            text = label_of(archive, name[: name.rindex(b".")])
            if text is None and name in dotted:
                text = label_of(archive, _key(name))
            labels.append(texts.setdefault(text, len(texts)))
    return Shard(
        Names.of(names),
        np.array(extents, np.int64).reshape(-1, 2),
        np.array(labels, np.int64),
        list(texts),
        [n for n, name in enumerate(names) if name.endswith(_ARRAYS)],
        notes,
    )


def _is_image(name: bytes) -> bool:
    return name.lower().endswith(_ENDINGS)


def _key(name: bytes) -> bytes:
    """Return WebDataset's sample key: the name up to the first dot after the last slash."""
    dot = name.find(b".", name.rfind(b"/") + 1)
    return name[:dot] if dot >= 0 else name


def _explain(path: str, head: bytes, error: DamagedTar) -> UserError:
    """Return the error of a file that is no complete tar, from its first bytes."""
    for magic, command in _COMPRESSED.items():
        if head.startswith(magic):
            return UserError(
                f"{path}: got a compressed file, expected an uncompressed tar, as images are read in random order: "
                f"decompress it with {command} (photographs hardly grow)"
            )
    if head.startswith(b"PAR1"):
        return UserError(
            f"{path}: got a Parquet file, expected a tar: load it by the datasets package in a function of your own, "
            "and pass mydata.py:function"
        )
    return UserError(
        f"{path}: got a truncated or damaged tar ({error}), expected a complete, uncompressed one: "
        "download or write it again"
    )
