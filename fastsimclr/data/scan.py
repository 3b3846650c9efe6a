"""Check that every image of a source decodes, and find its size. The results are cached.

A file that does not decode would end a run hours into an epoch. So every image is decoded before the first epoch, on
all cores of all ranks, and skipped if that fails. The next scan checks only new and changed files.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.images import decode
from fastsimclr.data.pixels import RGB8
from fastsimclr.data.sources import EncodedSource
from fastsimclr.distributed import SINGLE_PROCESS, World, broadcast_object, gather_objects
from fastsimclr.errors import UserError
from fastsimclr.progress_bar import progress_bar
from fastsimclr.run_folder import replace_atomically

CACHE_FILE = "image_scan.npz"
SKIPPED_FILE = "skipped_images.txt"
_MAX_LISTED = 3  # bad images named in an error
_ROUND_S = 2.0  # between collectives: short enough to react to a signal and to stay within their timeout
_SAVE_EVERY_S = 60.0
_PROGRESS_AFTER_S = 2.0
_STAT_THREADS = 16  # stat is bound by latency on network storage, not by the CPU

# Cache entry of an image. place: hash of the file's absolute path, the image's offset in it and the format to which it
# is decoded. bytes, mtime_ns: size and modification time of the file. height, width: of the upright image; 0 if it does
# not decode.
_ENTRY = np.dtype([("place", "<u8"), ("bytes", "<i8"), ("mtime_ns", "<i8"), ("height", "<i4"), ("width", "<i4")])
_UNCACHED = -1  # value of bytes: the result is not cached, as it may not be due to the file's content


@dataclass(frozen=True)
class Scan:
    """Result of a scan: the images that decode, and those that do not."""

    source: EncodedSource
    """The images that decode, in the order of the scanned source, with its labels and classes; `sizes` is set."""
    bad: list[str]
    """One line per skipped image: its name and the reason."""
    checked: int
    """Number of images decoded by this scan on all ranks; the results of the others were cached."""


class BadImages(UserError):
    """The fraction of bad images exceeds the limit. bad: one line per image, its name and the reason."""

    def __init__(self, message: str, bad: list[str]) -> None:
        super().__init__(message)
        self.bad = bad


class ScanStopped(Exception):
    """A rank was told to stop during the scan. The results so far are cached."""


class _ImageCheck(NamedTuple):
    image: int  # index in the source
    height: int  # of the upright image; 0 if it cannot be used
    width: int
    reason: str  # why it cannot be used, else ""
    cacheable: bool  # False if the failure may be transient: the file could not be read, or memory ran out


def scan(
    source: EncodedSource,
    *,
    max_bad: float = 0.01,
    cache: str | Path | None = None,
    world: World = SINGLE_PROCESS,
    stop: Callable[[], bool] = lambda: False,
) -> Scan:
    """Decode every image of `source` whose result is not cached, and return the images that decode.

    max_bad: largest fraction of images that may be bad.
    cache: folder of the cache file (image_scan.npz); None disables caching.
    world: ranks that share the work; all return the same result.
    stop: called before each image; once it returns True on any rank, all ranks raise ScanStopped.
    Raises, on all ranks, UserError if the ranks see different images, and BadImages (a UserError that names a few of
    them) if all images are bad or more than `max_bad` of them.
    """
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad: got {max_bad}, expected a fraction from 0 to 1")
    _check_same_images(source, world)
    # Only rank 0 has a cache: other nodes may not see its folder, and their copies of the files have other modification
    # times.
    scan_cache = (
        _ScanCache(source, Path(cache) / CACHE_FILE if cache is not None else None) if world.is_rank_zero else None
    )
    unchecked, error = broadcast_object(scan_cache.start() if scan_cache else None, world)
    if error:
        raise UserError(error)
    if len(unchecked):
        try:
            _check_all(source, unchecked, scan_cache, world, stop)
        finally:
            if scan_cache:
                scan_cache.save()
    heights, widths, reasons, error = broadcast_object(scan_cache.result() if scan_cache else None, world)
    if error:
        raise UserError(error)

    bad = [f"{source.name(index)}: {reasons[index]}" for index in sorted(reasons)]
    # Compared as a quotient: 3 / 300 is exactly 0.01 in floating point, but 0.01 * 300 may not be exactly 3.
    if len(bad) / len(source) > max_bad or len(bad) == len(source):
        expected = f"a fraction of at most {max_bad:g}" if max_bad < 1 else "at least one that can"
        listed = "; ".join(bad[:_MAX_LISTED])
        if len(bad) > _MAX_LISTED:
            listed += f"; and {len(bad) - _MAX_LISTED} more"
        raise BadImages(
            f"max_bad: got {len(bad)} of {len(source)} images that cannot be used, expected {expected}: {listed}; "
            "remove or replace them, or raise the limit",
            bad,
        )
    kept = np.flatnonzero(heights)
    good = source.subset(kept)
    good.sizes = np.stack([heights, widths], axis=1)[kept].astype(np.int64)
    return Scan(good, bad, len(unchecked))


def write_skipped_images(folder: Path, bad: Sequence[str]) -> Path:
    """Write the lines `bad` to `folder`/skipped_images.txt. If there are none, remove the list of an earlier run."""
    file = folder / SKIPPED_FILE
    if bad:
        lines = "".join(line.replace("\n", "\\n") + "\n" for line in bad)
        with replace_atomically(file) as partial:
            partial.write_text(lines, encoding="utf-8", errors="surrogateescape")  # file names may be any bytes
    else:
        file.unlink(missing_ok=True)
    return file


def _check_same_images(source: EncodedSource, world: World) -> None:
    """Raise UserError on all ranks unless all see images of the same names, as they divide the work by index."""
    if world.world_size == 1:
        return
    names = hashlib.blake2b("\0".join(map(source.name, range(len(source)))).encode(errors="surrogateescape"))
    seen = gather_objects((len(source), names.digest()), world)
    for rank, on_rank in enumerate(seen):
        if on_rank != seen[0]:
            raise UserError(
                f"data: got {on_rank[0]} images on rank {rank} and {seen[0][0]} on rank 0, expected the same names on "
                "all ranks: give every node the same files"
            )


def _check_all(
    source: EncodedSource,
    unchecked: NDArray[np.int64],
    scan_cache: "_ScanCache | None",
    world: World,
    stop: Callable[[], bool],
) -> None:
    """Check the images `unchecked` on all ranks, and record the results in rank 0's cache."""
    queue = deque(unchecked[world.rank :: world.world_size].tolist())
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    progress = progress_bar(
        len(unchecked), "checking images", "image", visible=world.is_rank_zero, delay=_PROGRESS_AFTER_S
    )
    last_save = time.monotonic()
    with closing(progress), ThreadPoolExecutor(threads) as pool:  # decoding releases the GIL
        while True:
            results, exception = [], None
            try:
                results = _check_round(source, queue, pool, threads, stop)
            except Exception as error:  # an internal error: the other ranks must not wait for this one
                exception = error
            status = (results, len(queue), stop(), repr(exception) if exception else "")
            results_by_rank, remaining, stopped, errors = zip(*gather_objects(status, world), strict=True)
            if scan_cache:
                for rank_results in results_by_rank:
                    scan_cache.record(rank_results)
            progress.update(sum(map(len, results_by_rank)))
            if any(errors):
                raise exception or RuntimeError("another rank failed: " + "; ".join(filter(None, errors)))
            if any(stopped):
                raise ScanStopped
            if not any(remaining):
                return
            if scan_cache and time.monotonic() - last_save > _SAVE_EVERY_S:  # a killed scan keeps its results
                scan_cache.save()
                last_save = time.monotonic()


def _check_round(
    source: EncodedSource, queue: deque[int], pool: ThreadPoolExecutor, threads: int, stop: Callable[[], bool]
) -> list[_ImageCheck]:
    """Take images from `queue` and check them in `threads` threads for _ROUND_S seconds; return the results."""
    end = time.monotonic() + _ROUND_S

    def work() -> list[_ImageCheck]:
        results = []
        while time.monotonic() < end and not stop():
            try:
                index = queue.popleft()
            except IndexError:
                break
            results.append(_check_image(source, index))
        return results

    return [result for future in [pool.submit(work) for _ in range(threads)] for result in future.result()]


def _check_image(source: EncodedSource, index: int) -> _ImageCheck:
    is_read = False
    try:
        data = source.read(index)
        is_read = True
        _, height, width = decode(data, source.name(index), source.pixels).shape
    except UserError as error:
        reason, _, _ = str(error).removeprefix(f"{source.name(index)}: ").partition("; expected")
        no_memory = isinstance(error.__cause__, MemoryError) or "alloc" in str(error.__cause__)
        return _ImageCheck(index, 0, 0, reason, cacheable=is_read and not no_memory)
    return _ImageCheck(index, height, width, "", cacheable=True)


class _ScanCache:
    """Results for every image of a source, from the cache file and from this scan."""

    def __init__(self, source: EncodedSource, file: Path | None) -> None:
        self._file = file
        self._error = ""
        self._rows = _stat(source)
        self._known = np.zeros(len(source), bool)
        self._reasons: dict[int, str] = {}  # of the bad images, by index
        self._old, self._old_reasons = _load(file)
        if len(self._old):
            nearest = self._old[np.searchsorted(self._old["place"], self._rows["place"]).clip(max=len(self._old) - 1)]
            self._known = self._rows["bytes"] != _UNCACHED
            for name in ("place", "bytes", "mtime_ns"):
                self._known &= self._rows[name] == nearest[name]
            self._rows[self._known] = nearest[self._known]
            for index in np.flatnonzero(self._known & (nearest["height"] == 0)).tolist():
                self._reasons[index] = self._old_reasons[int(nearest["place"][index])]

    def start(self) -> tuple[NDArray[np.int64], str]:
        """Return the images to check, and an error if the cache cannot be written: known before the work is done."""
        unchecked = np.flatnonzero(~self._known)
        if len(unchecked):
            self.save()
        return unchecked, self._error

    def record(self, results: Sequence[_ImageCheck]) -> None:
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
