"""The results of scans, kept in a file for the next one."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.checks import ImageCheck, all_values_valid
from fastsimclr.data.datasets import DatasetSource
from fastsimclr.data.pixels import RGB8
from fastsimclr.data.sources import EncodedSource, Source
from fastsimclr.run_folder import replace_atomically

CACHE_FILE = "image_scan.npz"
_STAT_THREADS = 16  # stat is bound by latency on network storage, not by the CPU

# Cache entry of an image. place: hash of the file's absolute path, the image's offset in it and the format to which it
# is decoded. bytes, mtime_ns: size and modification time of the file. height, width: of the upright image; 0 if it does
# not decode.
_ENTRY = np.dtype([("place", "<u8"), ("bytes", "<i8"), ("mtime_ns", "<i8"), ("height", "<i4"), ("width", "<i4")])
_UNCACHED = -1  # value of bytes: the result is not cached, as it may not be due to the file's content


class ScanCache:
    """Results for every image of a source, from the cache file and from this scan."""

    def __init__(self, source: Source, file: Path | None) -> None:
        """file: None, or the cache file, which is for the images of an EncodedSource only."""
        self._file = file if isinstance(source, EncodedSource) else None
        self._error = ""
        self._rows = _stat(source) if isinstance(source, EncodedSource) else np.zeros(len(source), _ENTRY)
        self._known = np.zeros(len(source), bool)
        self._reasons: dict[int, str] = {}  # of the bad images, by index
        self._old, self._old_reasons = _load(self._file)
        if len(self._old):
            nearest = self._old[np.searchsorted(self._old["place"], self._rows["place"]).clip(max=len(self._old) - 1)]
            self._known = self._rows["bytes"] != _UNCACHED
            for name in ("place", "bytes", "mtime_ns"):
                self._known &= self._rows[name] == nearest[name]
            self._rows[self._known] = nearest[self._known]
            for index in np.flatnonzero(self._known & (nearest["height"] == 0)).tolist():
                self._reasons[index] = self._old_reasons[int(nearest["place"][index])]
        if isinstance(source, DatasetSource) and source.reasons is not None and all_values_valid(source.pixels):
            assert source.sizes is not None
            self._rows["height"], self._rows["width"] = source.sizes.T
            self._known[:] = True
            self._reasons = {
                i: source.reasons[row] for i, row in enumerate(source.rows.tolist()) if row in source.reasons
            }

    def start(self) -> tuple[NDArray[np.int64], str]:
        """Return the images to check, and an error if the cache cannot be written: known before the work is done."""
        unchecked = np.flatnonzero(~self._known)
        if len(unchecked):
            self.save()
        return unchecked, self._error

    def record(self, results: Sequence[ImageCheck]) -> None:
        for result in results:
            self._rows["height"][result.image], self._rows["width"][result.image] = result.height, result.width
            self._known[result.image] = True
            if result.reason:
                self._reasons[result.image] = result.reason
            if not result.cacheable:
                self._rows["bytes"][result.image] = _UNCACHED

    def result(self) -> tuple[NDArray[np.int32], NDArray[np.int32], dict[int, str], str]:
        """Return heights, widths, reasons of bad images by index, and an error if the cache could not be written."""
        return self._rows["height"], self._rows["width"], self._reasons, self._error

    def save(self) -> None:
        """Replace the cache file, keeping its entries of other sources. An error is returned by `result`."""
        if self._file is None:
            return
        new = self._known & (self._rows["bytes"] != _UNCACHED)
        entries = np.concatenate([self._rows[new], self._old])
        entries = entries[np.unique(entries["place"], return_index=True)[1]]  # new before old
        texts = self._old_reasons | {int(self._rows["place"][i]): text for i, text in self._reasons.items()}
        reasons = {place: texts[place] for place in entries["place"][entries["height"] == 0].tolist()}
        partial = self._file.with_suffix(f".{os.getpid()}.partial")  # other processes may scan at the same time
        reasons_json = np.frombuffer(json.dumps(reasons).encode(), np.uint8)
        try:
            with replace_atomically(self._file, partial), open(partial, "wb") as file:
                np.savez(file, made_by=np.array(_decoder_versions()), entries=entries, faults=reasons_json)
        except OSError as error:
            self._error = f"{self._file}: cannot be written ({error.strerror}); expected a folder to write to"


def _decoder_versions() -> str:
    """Return the versions that a cache file must match: other decoders may give other results."""
    return f"fastsimclr scan 1, torchvision {version('torchvision')}, Pillow {version('pillow')}"


def _load(file: Path | None) -> tuple[NDArray[np.void], dict[int, str]]:
    """Read the cache: entries sorted by place, and the reasons of bad images by place. Empty if it is not valid."""
    empty = np.empty(0, _ENTRY)
    if file is None:
        return empty, {}
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as saved:
            made_by, entries = str(saved["made_by"]), saved["entries"]
            reasons = {int(place): str(reason) for place, reason in json.loads(saved["faults"].tobytes()).items()}
        valid = made_by == _decoder_versions() and entries.dtype == _ENTRY and entries.ndim == 1
        valid = valid and bool((entries["place"][1:] > entries["place"][:-1]).all())
        valid = valid and reasons.keys() == set(entries["place"][entries["height"] == 0].tolist())
    except Exception:  # any defect of the file: check the images again
        return empty, {}
    return (entries, reasons) if valid else (empty, {})


def _stat(source: EncodedSource) -> NDArray[np.void]:
    """Return entries (N,) with the place of each image and the current size and modification time of its file."""
    files, file_index, offset = source.locations()
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        stats = np.concatenate(list(pool.map(_stat_files, np.array_split(np.array(files), _STAT_THREADS))))
    rows = np.zeros(len(source), _ENTRY)
    rows["bytes"], rows["mtime_ns"] = stats[file_index].T
    absolute = [os.fsencode(os.path.abspath(file)) for file in files]
    decoded_as = b"" if source.pixels == RGB8 else b"\0" + repr(source.pixels).encode()
    places = (
        b"%s\0%d%s" % (absolute[n], o, decoded_as) for n, o in zip(file_index.tolist(), offset.tolist(), strict=True)
    )
    rows["place"] = np.frombuffer(b"".join(hashlib.blake2b(p, digest_size=8).digest() for p in places), "<u8")
    return rows


def _stat_files(files: NDArray[np.str_]) -> NDArray[np.int64]:
    """Return (files, 2): size in bytes and modification time in ns."""
    stats = np.empty((len(files), 2), np.int64)
    for row, file in zip(stats, files, strict=True):
        try:
            stat = os.stat(file)
            row[:] = stat.st_size, stat.st_mtime_ns
        except OSError:  # reported when the image is read
            row[:] = _UNCACHED, 0
    return stats
