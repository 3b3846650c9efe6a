"""Check that every image of a source can be read, and find its size. The results of files are cached.

A file that does not decode would end a run hours into an epoch. So every image is decoded before the first epoch, on
all cores of all ranks, and skipped if that fails. The next scan checks only new and changed files. The items of a
user's Dataset are all read again, as they may have changed: in this process if that is quick, else in workers.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastsimclr.data.arrays import MappedSource
from fastsimclr.data.checks import all_values_valid, check_all, open_checks
from fastsimclr.data.datasets import DatasetSource
from fastsimclr.data.scan_cache import CACHE_FILE, ScanCache
from fastsimclr.data.sources import ArraySource, Source
from fastsimclr.distributed import SINGLE_PROCESS, World, broadcast_object, gather_objects
from fastsimclr.errors import UserError
from fastsimclr.run_folder import replace_atomically

SKIPPED_FILE = "skipped_images.txt"
_MAX_LISTED = 3  # bad images named in an error
_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Scan:
    """Result of a scan: the images that decode, and those that do not."""

    source: Source
    """The images that can be used, in the order of the scanned source, with its labels and classes; `sizes` is set."""
    bad: list[str]
    """One line per skipped image: its name and the reason."""
    checked: int
    """Number of images decoded by this scan on all ranks; the results of the others were cached."""


class BadImages(UserError):
    """The fraction of bad images exceeds the limit. bad: one line per image, its name and the reason."""

    def __init__(self, message: str, bad: list[str]) -> None:
        super().__init__(message)
        self.bad = bad


def needs_scan(source: Source) -> bool:
    """Return whether an image of the source may be bad: not in an array whose values are all valid."""
    return not isinstance(source, ArraySource | MappedSource) or not all_values_valid(source.pixels)


def scan(
    source: Source,
    *,
    max_bad: float = 0.01,
    cache: str | Path | None = None,
    world: World = SINGLE_PROCESS,
    stop: Callable[[], bool] = lambda: False,
    workers: int | None = None,
) -> Scan:
    """Decode every image of `source` whose result is not cached, and return the images that decode.

    max_bad: largest fraction of images that may be bad.
    cache: folder of the cache file (image_scan.npz); None disables caching.
    world: ranks that share the work; all return the same result.
    stop: called before each image; once it returns True on any rank, all ranks raise ScanStopped.
    workers: processes per rank that read the items of a Dataset; None picks by the number of CPU cores.
    Raises, on all ranks, UserError if the ranks see different images, WrongForm (a UserError) for an image of another
    form than the others, and BadImages (a UserError that names a few of them) if all images are bad or more than
    `max_bad` of them.
    """
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad: got {max_bad}, expected a fraction from 0 to 1")
    check_same_images(source, world)
    # Only rank 0 has a cache: other nodes may not see its folder, and their copies of the files have other modification
    # times.
    scan_cache = (
        ScanCache(source, Path(cache) / CACHE_FILE if cache is not None else None) if world.is_rank_zero else None
    )
    unchecked, error = broadcast_object(scan_cache.start() if scan_cache else None, world)
    if error:
        raise UserError(error)
    if len(unchecked):
        checks = open_checks(source, unchecked[world.rank :: world.world_size], workers)
        last_save = time.monotonic()
        try:
            for results in check_all(checks, len(unchecked), world, stop):
                if scan_cache:
                    scan_cache.record(results)
                    if time.monotonic() - last_save > _SAVE_EVERY_S:  # a killed scan keeps its results
                        scan_cache.save()
                        last_save = time.monotonic()
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


def read_labels(source: Source, world: World = SINGLE_PROCESS, workers: int | None = None) -> None:
    """Read all items of a Dataset whose labels are unread, and set its labels. Items that fail have none.

    All ranks, which must have the same images, share the work. Raises WrongForm on all ranks like `scan`.
    """
    if not (isinstance(source, DatasetSource) and source.labels_unread):
        return
    checks = open_checks(source, np.arange(len(source))[world.rank :: world.world_size], workers)
    results = sorted(result for of_round in check_all(checks, len(source), world) for result in of_round)
    source.sizes = np.array([(result.height, result.width) for result in results])
    source.reasons = {result.image: result.reason for result in results if result.reason}
    source.set_labels([result.label for result in results])


def check_same_images(source: Source, world: World) -> None:
    """Raise UserError on all ranks unless all have images of the same names and labels, as they divide the work."""
    if world.world_size == 1:
        return
    seen = gather_objects((len(source), source.digest()), world)
    for rank, on_rank in enumerate(seen):
        if on_rank != seen[0]:
            raise UserError(
                f"data: got {on_rank[0]} images on rank {rank} and {seen[0][0]} on rank 0, expected the same names and "
                "labels on all ranks: give every node the same data"
            )
