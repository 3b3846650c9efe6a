"""Read every image of a source: the full check of `fastsimclr doctor --data`, and the labels that only items have.

A run does not need the check: it replaces a bad image when it meets it. All cores of all ranks share the work. Results
for image files are kept in the user's cache folder, so that the next check reads only new and changed files; the items
of a user's Dataset are all read again, as they may have changed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.arrays import MappedSource
from fastsimclr.data.check_results import CheckResults
from fastsimclr.data.checks import ImageCheck, all_values_valid, check_all, open_checks
from fastsimclr.data.datasets import DatasetSource
from fastsimclr.data.sources import ArraySource, EncodedSource, Source, decoded
from fastsimclr.distributed import SINGLE_PROCESS, World, broadcast_object, gather_objects
from fastsimclr.errors import UserError
from fastsimclr.run_folder import replace_atomically

SKIPPED_FILE = "skipped_images.txt"
_SAVE_EVERY_S = 60.0
_VALUES_AT_ONCE = 1024  # images


@dataclass(frozen=True)
class Scan:
    """Result of a full check."""

    sizes: NDArray[np.int32]
    """(N, 2): height and width of each upright image; 0 if it cannot be used."""
    bad: dict[int, str]
    """The images that cannot be used, by index, and why."""
    read: int
    """Number of images that all ranks read; the results of the others were in the cache folder."""
    file: Path | None
    """The file of the results in the cache folder; None if they are not kept."""


def scan(
    source: Source,
    *,
    cache: Path | None = None,
    world: World = SINGLE_PROCESS,
    stop: Callable[[], bool] = lambda: False,
    workers: int | None = None,
) -> Scan:
    """Read and decode every image of `source`, except those whose results are in the cache folder.

    cache: the cache folder, for image files; None does not use it.
    world: ranks that share the work; all return the same result.
    stop: called before each image; once it returns True on any rank, all ranks raise Stopped. The results are kept.
    workers: processes per rank that read the items of a Dataset; None picks by the number of CPU cores.
    Raises, on all ranks, UserError if the ranks see different images, and WrongForm (a UserError) for an image of a
    form that the source cannot have.
    """
    check_same_images(source, world)
    if isinstance(source, ArraySource | MappedSource) and all_values_valid(source.pixels):
        return Scan(np.full((len(source), 2), source.images.shape[1:3], np.int32), {}, 0, None)
    if isinstance(source, DatasetSource) and source.sizes is not None and all_values_valid(source.pixels):
        return Scan(source.sizes, dict(source.bad), 0, None)  # read for their labels
    if isinstance(source, EncodedSource) and cache is not None:
        return _scan_files(source, cache, world, stop)
    sizes, bad = np.zeros((len(source), 2), np.int32), {}
    for results in _read(source, np.arange(len(source)), "checking images", world, stop, workers):
        for result in results:
            sizes[result.image] = result.height, result.width
            if result.reason:
                bad[result.image] = result.reason
    return Scan(sizes, dict(sorted(bad.items())), len(source), None)


def _scan_files(source: EncodedSource, cache: Path, world: World, stop: Callable[[], bool]) -> Scan:
    # Only rank 0 uses the cache folder: those of other nodes have other files, and so may their copies of the images.
    known = CheckResults(source, cache) if world.is_rank_zero else None
    unchecked = broadcast_object(known.unchecked if known else None, world)
    last_save = time.monotonic()
    try:
        for results in _read(source, unchecked, "checking images", world, stop):
            if known:
                known.record(results)
                if time.monotonic() - last_save > _SAVE_EVERY_S:  # a killed check keeps its results
                    known.save()
                    last_save = time.monotonic()
    finally:
        is_saved = known is not None and len(unchecked) > 0 and known.save()
    result = None
    if known:
        file = known.file if is_saved or not len(unchecked) else None
        result = Scan(known.sizes, dict(sorted(known.reasons.items())), len(unchecked), file)
    return broadcast_object(result, world)


def read_labels(source: Source, world: World = SINGLE_PROCESS, workers: int | None = None) -> None:
    """Read all items of a Dataset whose labels are unread, and set its labels. Items that fail have none.

    All ranks, which must have the same images, share the work. Raises WrongForm on all ranks like `scan`.
    """
    if not (isinstance(source, DatasetSource) and source.labels_unread):
        return
    read = _read(source, np.arange(len(source)), "reading all items for their labels", world, workers=workers)
    results = sorted(result for of_round in read for result in of_round)
    source.sizes = np.array([(result.height, result.width) for result in results], np.int32)
    source.bad = {result.image: result.reason for result in results if result.reason}
    source.set_labels([result.label for result in results])


def _read(
    source: Source,
    indices: NDArray[np.int64],
    title: str,
    world: World,
    stop: Callable[[], bool] = lambda: False,
    workers: int | None = None,
) -> Iterator[list[ImageCheck]]:
    """Read the images `indices`, shared by all ranks; yield the results of all ranks, a few seconds' at a time."""
    if len(indices):
        checks = open_checks(source, indices[world.rank :: world.world_size], workers)
        yield from check_all(checks, len(indices), title, world, stop)


def check_values(source: Source) -> None:
    """Raise WrongForm, which names an image, if an array in memory has values that are not finite or out of range."""
    if not isinstance(source, ArraySource) or all_values_valid(source.pixels):
        return
    for first in range(0, len(source), _VALUES_AT_ONCE):
        images = range(first, min(first + _VALUES_AT_ONCE, len(source)))
        try:
            source.pixels.check(source.images[images.start : images.stop].movedim(3, 0), "")
        except UserError:
            for index in images:
                decoded(source, index)


def write_skipped_images(folder: Path, bad: Sequence[str]) -> Path:
    """Write the lines `bad` to `folder`/skipped_images.txt. If there are none, remove the list of an earlier run."""
    file = folder / SKIPPED_FILE
    if bad:
        write_lines(file, bad)
    else:
        file.unlink(missing_ok=True)
    return file


def write_lines(file: Path, lines: Sequence[str]) -> None:
    """Replace a text file atomically. A line break within a line is written as a backslash and n."""
    with replace_atomically(file) as partial:
        text = "".join(line.replace("\n", "\\n") + "\n" for line in lines)
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")  # file names may be any bytes


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
