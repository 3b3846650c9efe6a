"""Which images of a source decode, and how large they are: each is decoded once, and what was found is kept.

A file that does not decode would end an epoch hours in. So each is tried before the first epoch, on all cores of all
ranks, and left out if it fails. The next scan tries only what is new or has changed.
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
from fastsimclr.data.sources import EncodedSource
from fastsimclr.distributed import SINGLE_PROCESS, World, broadcast_object, gather_objects
from fastsimclr.errors import UserError
from fastsimclr.progress_bar import progress_bar
from fastsimclr.run_folder import replace_atomically

CACHE_FILE = "image_scan.npz"
SKIPPED_FILE = "skipped_images.txt"
_SHOWN = 3  # bad images that an error names
_ROUND_S = 2.0  # between exchanges of the ranks: none waits long for a signal, nor up to a collective's timeout
_SAVE_EVERY_S = 60.0
_PROGRESS_AFTER_S = 2.0
_STAT_THREADS = 16  # on network storage a stat waits, and needs no core

# An image in the cache. The place is a hash of its file's absolute path and its offset there; bytes and mtime_ns are
# the file's. height and width are upright, and 0 if it does not decode.
_ENTRY = np.dtype([("place", "<u8"), ("bytes", "<i8"), ("mtime_ns", "<i8"), ("height", "<i4"), ("width", "<i4")])
_UNCACHED = -1  # as bytes: what was found is not of the file as it lies there


@dataclass(frozen=True)
class Scan:
    """The images of a source that decode, and those that do not."""

    source: EncodedSource
    """The good ones alone, in the source's order and with its labels and classes; `sizes` is set."""
    bad: list[str]
    """What was wrong with each image that was left out, beginning with its name."""
    checked: int
    """Images that were decoded now, by all ranks; of the others the cache knew."""


class BadImages(UserError):
    """More images are bad than is let pass. bad: what is wrong with each, beginning with its name."""

    def __init__(self, message: str, bad: list[str]) -> None:
        super().__init__(message)
        self.bad = bad


class ScanStopped(Exception):
    """A rank was told to stop in mid-scan. What was found until then is kept."""


class _ImageCheck(NamedTuple):
    number: int  # of the image in its source
    height: int  # upright; 0 if the image cannot be used
    width: int
    fault: str  # why it cannot
    keep: bool  # it is of the bytes, and not of a lack that may pass: of access to them, of memory


def scan(
    source: EncodedSource,
    *,
    max_bad: float = 0.01,
    cache: str | Path | None = None,
    world: World = SINGLE_PROCESS,
    stop: Callable[[], bool] = lambda: False,
) -> Scan:
    """Decode every image of `source` that is not yet known to decode, or not to.

    max_bad: the largest fraction of bad images that is let pass.
    cache: a folder to keep what was found in (image_scan.npz), and to find it again; None: nowhere.
    world: its ranks share the work, and all return the same.
    stop: asked before each image; once true on any rank, all raise ScanStopped.
    Raises UserError, on all ranks, if the ranks see different images; BadImages, a UserError that names a few, if more
    than `max_bad` of them are bad, or all.
    """
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad: got {max_bad}, expected a fraction from 0 to 1")
    _check_same_images(source, world)
    # The first rank alone has a cache: other nodes may not see its folder, and their copies of the files have other
    # times.
    scan_cache = (
        _ScanCache(source, Path(cache) / CACHE_FILE if cache is not None else None) if world.is_rank_zero else None
    )
    todo, failure = broadcast_object(scan_cache.start() if scan_cache else None, world)
    if failure:
        raise UserError(failure)
    if len(todo):
        try:
            _check_all(source, todo, scan_cache, world, stop)
        finally:
            if scan_cache:
                scan_cache.save()
    heights, widths, faults, failure = broadcast_object(scan_cache.result() if scan_cache else None, world)
    if failure:
        raise UserError(failure)

    bad = [f"{source.name(index)}: {faults[index]}" for index in sorted(faults)]
    # A quotient: 3 / 300 is 0.01 to the bit, where 0.01 * 300 need not be 3.
    if len(bad) / len(source) > max_bad or len(bad) == len(source):
        expected = f"a fraction of at most {max_bad:g}" if max_bad < 1 else "some that can"
        shown = "; ".join(bad[:_SHOWN]) + (f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
        raise BadImages(
            f"max_bad: got {len(bad)} of {len(source)} images that cannot be used, expected {expected}: {shown}; "
            "remove or replace them, or allow more",
            bad,
        )
    kept = np.flatnonzero(heights)
    good = source.subset(kept)
    good.sizes = np.stack([heights, widths], axis=1)[kept].astype(np.int64)
    return Scan(good, bad, len(todo))


def write_skipped_images(folder: Path, bad: Sequence[str]) -> Path:
    """Write what was wrong with each image left out to `folder`/skipped_images.txt, a line each; without any, remove
    the list of an earlier run, whose files have been mended."""
    file = folder / SKIPPED_FILE
    if bad:
        lines = "".join(line.replace("\n", "\\n") + "\n" for line in bad)
        with replace_atomically(file) as partial:
            partial.write_text(lines, encoding="utf-8", errors="surrogateescape")  # names are any bytes
    else:
        file.unlink(missing_ok=True)
    return file


def _check_same_images(source: EncodedSource, world: World) -> None:
    """Raise UserError on all ranks unless all see images of the same names: they are shared out by number."""
    if world.world_size == 1:
        return
    names = hashlib.blake2b("\0".join(map(source.name, range(len(source)))).encode(errors="surrogateescape"))
    seen = gather_objects((len(source), names.digest()), world)
    for rank, theirs in enumerate(seen):
        if theirs != seen[0]:
            raise UserError(
                f"data: got {theirs[0]} images on rank {rank} and {seen[0][0]} on rank 0, expected the same names on "
                "all ranks: give every node the same files"
            )


def _check_all(
    source: EncodedSource,
    todo: NDArray[np.int64],
    scan_cache: "_ScanCache | None",
    world: World,
    stop: Callable[[], bool],
) -> None:
    """Enter in the first rank's `book` what all ranks find of the images `todo`."""
    waiting = deque(todo[world.rank :: world.world_size].tolist())
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    progress = progress_bar(len(todo), "checking images", "image", visible=world.is_rank_zero, delay=_PROGRESS_AFTER_S)
    saved = time.monotonic()
    with closing(progress), ThreadPoolExecutor(threads) as pool:  # decoding releases the GIL
        while True:
            found, failure = [], None
            try:
                found = _check_for_a_round(source, waiting, pool, threads, stop)
            except Exception as error:  # an internal error: the other ranks must not wait for this one
                failure = error
            everyone = gather_objects((found, len(waiting), stop(), repr(failure) if failure else ""), world)
            parts, left, stopped, failures = zip(*everyone, strict=True)
            if scan_cache:
                for part in parts:
                    scan_cache.record(part)
            progress.update(sum(map(len, parts)))
            if any(failures):
                raise failure or RuntimeError("another rank has failed: " + "; ".join(filter(None, failures)))
            if any(stopped):
                raise ScanStopped
            if not any(left):
                return
            if scan_cache and time.monotonic() - saved > _SAVE_EVERY_S:  # a scan that is killed was not in vain
                scan_cache.save()
                saved = time.monotonic()


def _check_for_a_round(
    source: EncodedSource, waiting: deque[int], pool: ThreadPoolExecutor, threads: int, stop: Callable[[], bool]
) -> list[_ImageCheck]:
    """What `threads` threads find in _ROUND_S of the images that are `waiting`, which are taken from there."""
    end = time.monotonic() + _ROUND_S

    def take() -> list[_ImageCheck]:
        found = []
        while time.monotonic() < end and not stop():
            try:
                index = waiting.popleft()
            except IndexError:
                break
            found.append(_check_image(source, index))
        return found

    return [found for thread in [pool.submit(take) for _ in range(threads)] for found in thread.result()]


def _check_image(source: EncodedSource, index: int) -> _ImageCheck:
    was_read = False
    try:
        data = source.read(index)
        was_read = True
        _, height, width = decode(data, source.name(index)).shape
    except UserError as error:
        fault, _, _ = str(error).removeprefix(f"{source.name(index)}: ").partition("; expected")
        no_memory = isinstance(error.__cause__, MemoryError) or "alloc" in str(error.__cause__)
        return _ImageCheck(index, 0, 0, fault, keep=was_read and not no_memory)
    return _ImageCheck(index, height, width, "", keep=True)


class _ScanCache:
    """What is known of every image of a source, from the cache and from this scan."""

    def __init__(self, source: EncodedSource, file: Path | None) -> None:
        self._file = file
        self._failure = ""
        self._rows = _stat(source)
        self._known = np.zeros(len(source), bool)
        self._faults: dict[int, str] = {}  # by index
        self._old, self._old_faults = _load(file)
        if len(self._old):
            nearest = self._old[np.searchsorted(self._old["place"], self._rows["place"]).clip(max=len(self._old) - 1)]
            self._known = self._rows["bytes"] != _UNCACHED
            for name in ("place", "bytes", "mtime_ns"):
                self._known &= self._rows[name] == nearest[name]
            self._rows[self._known] = nearest[self._known]
            for index in np.flatnonzero(self._known & (nearest["height"] == 0)).tolist():
                self._faults[index] = self._old_faults[int(nearest["place"][index])]

    def start(self) -> tuple[NDArray[np.int64], str]:
        """The images to try, and why the cache cannot be written, if so: better known now than after the work."""
        todo = np.flatnonzero(~self._known)
        if len(todo):
            self.save()
        return todo, self._failure

    def record(self, found: Sequence[_ImageCheck]) -> None:
        for image in found:
            self._rows["height"][image.number], self._rows["width"][image.number] = image.height, image.width
            self._known[image.number] = True
            if image.fault:
                self._faults[image.number] = image.fault
            if not image.keep:
                self._rows["bytes"][image.number] = _UNCACHED

    def result(self) -> tuple[NDArray[np.int32], NDArray[np.int32], dict[int, str], str]:
        """Heights, widths, faults by index; and why the cache could not be written, if so."""
        return self._rows["height"], self._rows["width"], self._faults, self._failure

    def save(self) -> None:
        """Write the cache, replacing it whole. It keeps what it knew of other sources. Leaves a failure to `result`."""
        if self._file is None:
            return
        new = self._known & (self._rows["bytes"] != _UNCACHED)
        entries = np.concatenate([self._rows[new], self._old])
        entries = entries[np.unique(entries["place"], return_index=True)[1]]  # the first of each place, so the new
        texts = self._old_faults | {int(self._rows["place"][i]): text for i, text in self._faults.items()}
        faults = {place: texts[place] for place in entries["place"][entries["height"] == 0].tolist()}
        partial = self._file.with_suffix(f".{os.getpid()}.partial")  # two commands may scan at the same time
        as_json = np.frombuffer(json.dumps(faults).encode(), np.uint8)
        try:
            with replace_atomically(self._file, partial), open(partial, "wb") as file:
                np.savez(file, made_by=np.array(_decoder_versions()), entries=entries, faults=as_json)
        except OSError as error:
            self._failure = f"{self._file}: cannot be written ({error.strerror}); expected a folder to write to"


def _decoder_versions() -> str:
    """Other decoders may come to other ends: what they left is not believed."""
    return f"fastsimclr scan 1, torchvision {version('torchvision')}, Pillow {version('pillow')}"


def _load(file: Path | None) -> tuple[NDArray[np.void], dict[int, str]]:
    """The cache's entries, sorted by place, and the faults of its bad ones by place; none if it is not a whole one."""
    nothing = np.empty(0, _ENTRY)
    if file is None:
        return nothing, {}
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as saved:
            made_by, entries = str(saved["made_by"]), saved["entries"]
            faults = {int(place): str(fault) for place, fault in json.loads(saved["faults"].tobytes()).items()}
        whole = made_by == _decoder_versions() and entries.dtype == _ENTRY and entries.ndim == 1
        whole = whole and bool((entries["place"][1:] > entries["place"][:-1]).all())
        whole = whole and faults.keys() == set(entries["place"][entries["height"] == 0].tolist())
    except Exception:  # whatever is wrong with it: the answer is to try the images again
        return nothing, {}
    return (entries, faults) if whole else (nothing, {})


def _stat(source: EncodedSource) -> NDArray[np.void]:
    """(N,) of _ENTRY, with where each image lies and how its file is now, before it is read."""
    files, number, offset = source.locations()
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        stats = np.concatenate(list(pool.map(_stat_files, np.array_split(np.array(files), _STAT_THREADS))))
    rows = np.zeros(len(source), _ENTRY)
    rows["bytes"], rows["mtime_ns"] = stats[number].T
    absolute = [os.fsencode(os.path.abspath(file)) for file in files]
    places = (b"%s\0%d" % (absolute[n], o) for n, o in zip(number.tolist(), offset.tolist(), strict=True))
    rows["place"] = np.frombuffer(b"".join(hashlib.blake2b(p, digest_size=8).digest() for p in places), "<u8")
    return rows


def _stat_files(files: NDArray[np.str_]) -> NDArray[np.int64]:
    """(files, 2): size in bytes and time of modification in ns."""
    stats = np.empty((len(files), 2), np.int64)
    for row, file in zip(stats, files, strict=True):
        try:
            found = os.stat(file)
            row[:] = found.st_size, found.st_mtime_ns
        except OSError:  # reading it will say what is wrong
            row[:] = _UNCACHED, 0
    return stats
