"""Results of the full check of image files, kept in the user's cache folder and shared by all runs.

A file in it holds the results of one data set: an entry per image with its size, or the reason why it cannot be used.
An entry is that of an image if the image's name within its data set, its file's size and its file's modification time
are the same. So copies of the data share it wherever they lie, if they were made with the modification times (`cp -p`,
`rsync -a`, `tar`).
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.cache_folder import write_to_cache
from fastsimclr.data.checks import ImageCheck
from fastsimclr.data.sources import EncodedSource
from fastsimclr.data.storage import Storage
from fastsimclr.distributed import World, broadcast_object

FOLDER = "checks"
_STAT_THREADS = 16  # stat is bound by latency on network storage, not by the CPU
_SAMPLE = 64  # images by which the file of a data set is found

# key: hash of the image's name in its data set and of how it is decoded. bytes, mtime_ns: size and
# modification time of its file. height, width: of the upright image; 0 if it cannot be used, -1 if it is not checked.
_ENTRY = np.dtype([("key", "<u8"), ("bytes", "<i8"), ("mtime_ns", "<i8"), ("height", "<i4"), ("width", "<i4")])
_SAME = ("key", "bytes", "mtime_ns")  # what an entry has in common with its image
_NO_FILE = -1  # value of bytes
_UNCHECKED = -1  # value of height


class CheckResults:
    """The results for every image of a source: those in the cache folder, and those recorded here."""

    def __init__(self, source: EncodedSource, folder: Path) -> None:
        """folder: the cache folder."""
        self._rows = _entries(source, np.arange(len(source)))
        self.reasons: dict[int, str] = {}
        """Why images cannot be used, by index."""
        self._saved = _find(source, folder)
        self.file = self._saved.file
        """The file of the results, which may not exist."""
        found, at = self._saved.locate(self._rows, _SAME)
        self._rows[found] = self._saved.entries[at[found]]
        for index in np.flatnonzero(self._rows["height"] == 0).tolist():
            self.reasons[index] = self._saved.reasons[int(self._rows["key"][index])]

    @property
    def unchecked(self) -> NDArray[np.int64]:
        """The images without a result."""
        return np.flatnonzero(self._rows["height"] == _UNCHECKED)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2): height and width of each image; 0 if it cannot be used or is not checked."""
        return np.stack([self._rows["height"], self._rows["width"]], axis=1).clip(min=0)

    def record(self, results: Sequence[ImageCheck]) -> None:
        for result in results:
            self._rows["height"][result.image], self._rows["width"][result.image] = result.height, result.width
            if result.reason:
                self.reasons[result.image] = result.reason
            if not result.cacheable:
                self._rows["bytes"][result.image] = _NO_FILE

    def save(self) -> bool:
        """Replace the file, keeping its entries of other images. Returns whether it could be written."""
        saved = self._saved
        entries = np.concatenate([self._rows[self._rows["bytes"] != _NO_FILE], saved.entries])
        entries = entries[np.unique(entries["key"], return_index=True)[1]]  # new before old
        texts = saved.reasons | {int(self._rows["key"][i]): text for i, text in self.reasons.items()}
        reasons = {key: texts[key] for key in entries["key"][entries["height"] == 0].tolist()}
        as_bytes = np.frombuffer(json.dumps(reasons).encode(), np.uint8)

        def write(partial: Path) -> None:
            with open(partial, "wb") as opened:
                np.savez(opened, made_by=np.array(_decoder_versions()), entries=entries, reasons=as_bytes)

        return write_to_cache(self.file, write)


class KnownResults(NamedTuple):
    sizes: NDArray[np.int32]  # (N, 2), 0 where unknown
    bad: dict[int, str]


def use_results(source: EncodedSource, folder: Path, world: World) -> None:
    """Set `source.sizes` and `source.bad` to the results of an earlier full check, if there are any.

    Rank 0 reads them for all ranks. Only the files of bad images are compared with their entries, because asking for
    the size and time of all files takes minutes on network storage: a good image that has changed is read like any
    other, and its size is only a hint.
    """
    known = broadcast_object(_known(source, folder) if world.is_rank_zero else None, world)
    if known is not None:
        source.sizes, found = known
        source.bad = {**found, **source.bad}


def _known(source: EncodedSource, folder: Path) -> KnownResults | None:
    saved = _find(source, folder)
    if not len(saved.entries):
        return None
    rows = np.zeros(len(source), _ENTRY)
    rows["key"] = _keys(source)
    found, at = saved.locate(rows, ("key",))
    of_images = saved.entries[at]
    bad = np.flatnonzero(found & (of_images["height"] == 0))
    current = _entries(source, bad)
    bad = bad[(current["bytes"] == of_images["bytes"][bad]) & (current["mtime_ns"] == of_images["mtime_ns"][bad])]
    sizes = np.stack([of_images["height"], of_images["width"]], axis=1)
    sizes[~found | (sizes[:, 0] < 0)] = 0
    return KnownResults(sizes, {index: saved.reasons[int(of_images["key"][index])] for index in bad.tolist()})


@dataclass(frozen=True)
class _Saved:
    """The content of a file: entries in the order of their keys, and the reasons of bad images by key."""

    file: Path
    entries: NDArray[np.void]
    reasons: dict[int, str]

    def locate(self, rows: NDArray[np.void], columns: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return, for each of `rows` (K,), whether an entry has the same values in these columns, and its number."""
        if not len(self.entries):
            return np.zeros(len(rows), bool), np.zeros(len(rows), np.int64)
        at = np.searchsorted(self.entries["key"], rows["key"]).clip(max=len(self.entries) - 1)
        return np.logical_and.reduce([self.entries[column][at] == rows[column] for column in columns]), at


def _find(source: EncodedSource, folder: Path) -> _Saved:
    """Return the file that holds most of a sample of the source's images, or if none holds one, a new file's name."""
    sample = _entries(source, np.linspace(0, len(source) - 1, min(len(source), _SAMPLE)).astype(np.int64))
    name = hashlib.blake2b(sample.tobytes(), digest_size=8).hexdigest()
    best, most = _Saved(folder / FOLDER / f"{name}.npz", np.empty(0, _ENTRY), {}), 0
    for file in sorted((folder / FOLDER).glob("*.npz")):
        saved = _load(file)
        matching = int(saved.locate(sample, _SAME)[0].sum())
        if matching > most:
            best, most = saved, matching
    return best


def _load(file: Path) -> _Saved:
    """Read a file; without entries if it is not valid."""
    empty = _Saved(file, np.empty(0, _ENTRY), {})
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as saved:
            made_by, entries = str(saved["made_by"]), saved["entries"]
            reasons = {int(key): str(reason) for key, reason in json.loads(saved["reasons"].tobytes()).items()}
        valid = made_by == _decoder_versions() and entries.dtype == _ENTRY and entries.ndim == 1
        valid = valid and bool((entries["key"][1:] > entries["key"][:-1]).all())
        valid = valid and reasons.keys() == set(entries["key"][entries["height"] == 0].tolist())
    except Exception:  # any defect of the file: the images are checked again
        return empty
    return _Saved(file, entries, reasons) if valid else empty


def _decoder_versions() -> str:
    """Return the versions that a file must match: other decoders may give other results."""
    return f"fastsimclr check 1, torchvision {version('torchvision')}, Pillow {version('pillow')}"


def _entries(source: EncodedSource, indices: NDArray[np.int64]) -> NDArray[np.void]:
    """Return unchecked entries (K,) of these images, with the current size and modification time of their files."""
    part = source.subset(indices)
    files, file_index, _ = part.locations()
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        parts = np.array_split(np.array(files, np.object_), _STAT_THREADS)
        stats = np.concatenate(list(pool.map(partial(_stat, source.storage), parts)))
    rows = np.zeros(len(part), _ENTRY)
    rows["key"] = _keys(part)
    rows["bytes"], rows["mtime_ns"] = stats[file_index].T
    rows["height"] = _UNCHECKED
    return rows


def _keys(source: EncodedSource) -> NDArray[np.uint64]:
    """Return the key (N,) of each image's entry."""
    decoded_as = f"{source.pixels.channels} {source.pixels.dtype} {source.max_pixels}".encode()
    return source.key_hashes() ^ np.frombuffer(hashlib.blake2b(decoded_as, digest_size=8).digest(), np.uint64)


def _stat(storage: Storage, files: NDArray[np.object_]) -> NDArray[np.int64]:
    """Return (files, 2): size in bytes and modification time in ns."""
    stats = np.empty((len(files), 2), np.int64)
    for row, file in zip(stats, files, strict=True):
        try:
            row[:] = storage.stat(file)
        except OSError:  # reported when the image is read
            row[:] = _NO_FILE, 0
    return stats
