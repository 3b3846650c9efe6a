"""Check images one by one: whether each can be read, on all ranks and their cores."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastsimclr.data.datasets import DatasetSource
from fastsimclr.data.images import decode
from fastsimclr.data.labels import Label
from fastsimclr.data.pixels import PixelFormat, default_format
from fastsimclr.data.sources import DecodedSource, EncodedSource, Source, WrongForm, reason_of
from fastsimclr.data.storage import UnreachableStorage
from fastsimclr.distributed import World, gather_objects, local_world_size
from fastsimclr.errors import UserError
from fastsimclr.progress_bar import progress_bar
from fastsimclr.stopping import Stopped

if TYPE_CHECKING:
    from fastsimclr.data.workers import WorkerLoader

_ROUND_S = 2.0  # between collectives: short enough to react to a signal and to stay within their timeout
_PROGRESS_AFTER_S = 2.0


class ImageCheck(NamedTuple):
    image: int  # index in the source
    height: int  # of the upright image; 0 if it cannot be used
    width: int
    reason: str = ""  # why it cannot be used
    cacheable: bool = True  # False if the failure may be transient: the file could not be read, or memory ran out
    wrong_form: bool = False  # the reason rejects the whole source
    label: Label = None  # if the source's labels are unread


def all_values_valid(pixels: PixelFormat) -> bool:
    return not pixels.dtype.is_floating_point and pixels == default_format(pixels.channels, pixels.dtype)


def check_all(
    checks: "Checks", images: int, title: str, world: World, stop: Callable[[], bool] = lambda: False
) -> Iterator[list[ImageCheck]]:
    """Run the checks of all ranks, of `images` images, and yield the results of each round, of all ranks on all.

    title: of the progress. stop: called before each image; once it is True on a rank, Stopped is raised on all. Raises
    the errors of any rank on all, and WrongForm for an image that the source cannot have.
    """
    progress = progress_bar(images, title, "image", visible=world.is_rank_zero, delay=_PROGRESS_AFTER_S)
    with closing(progress), closing(checks):
        while True:
            results, exception = [], None
            try:
                results = checks.round(stop)
            except Exception as error:  # the other ranks must not wait for this one
                exception = error
            failure = exception if isinstance(exception, UserError) else repr(exception) if exception else ""
            status = (results, checks.remaining, stop(), failure)
            results_by_rank, remaining, stopped, failures = zip(*gather_objects(status, world), strict=True)
            of_round = [result for rank_results in results_by_rank for result in rank_results]
            yield of_round
            progress.update(len(of_round))
            wrong = [result for result in of_round if result.wrong_form]
            if wrong:
                raise WrongForm(min(wrong).reason)
            for failure in failures:
                if isinstance(failure, UserError):
                    raise failure
            if any(failures):  # an internal error
                raise exception or RuntimeError("another rank failed: " + "; ".join(filter(None, failures)))
            if any(stopped):
                raise Stopped
            if not any(remaining):
                return


def open_checks(source: Source, indices: NDArray[np.int64], workers: int | None) -> "Checks":
    cores = max(1, len(os.sched_getaffinity(0)) // local_world_size())
    if isinstance(source, DatasetSource):
        return _DatasetChecks(source, indices, cores if workers is None else workers)
    return _ThreadChecks(source, indices, max(cores, source.parallel_reads))


class Checks(Protocol):
    """The checks of this rank."""

    @property
    def remaining(self) -> int: ...

    def round(self, stop: Callable[[], bool]) -> list[ImageCheck]:
        """Check images for _ROUND_S seconds."""
        ...

    def close(self) -> None: ...


class _ThreadChecks:
    """Checks in threads: decoding releases the GIL."""

    def __init__(self, source: Source, indices: NDArray[np.int64], threads: int) -> None:
        self._source, self._queue, self._threads = source, deque(indices.tolist()), threads
        self._pool = ThreadPoolExecutor(threads)

    @property
    def remaining(self) -> int:
        return len(self._queue)

    def round(self, stop: Callable[[], bool]) -> list[ImageCheck]:
        end = time.monotonic() + _ROUND_S

        def work() -> list[ImageCheck]:
            results = []
            while time.monotonic() < end and not stop():
                try:
                    index = self._queue.popleft()
                except IndexError:
                    break
                results.append(_check_image(self._source, index))
            return results

        return [
            result for future in [self._pool.submit(work) for _ in range(self._threads)] for result in future.result()
        ]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)  # a thread may wait for a file for ever


class _DatasetChecks:
    """Checks of a user's Dataset, which threads may not share: in this process, from the second round on in workers."""

    def __init__(self, source: DatasetSource, indices: NDArray[np.int64], workers: int) -> None:
        self._source, self._indices = source, indices.tolist()
        self._done = 0
        self._results: Iterator[ImageCheck] = map(partial(_check_image, source), self._indices)
        self._workers = workers if workers > 1 else 0  # a single one would be no faster
        self._loader: WorkerLoader[ImageCheck] | None = None

    @property
    def remaining(self) -> int:
        return len(self._indices) - self._done

    def round(self, stop: Callable[[], bool]) -> list[ImageCheck]:
        if self._done and self._workers and self._loader is None:
            from fastsimclr.data.workers import WorkerLoader  # here: the view kernels need only PyTorch and torchvision

            self._loader = WorkerLoader(
                _CheckedImages(self._source), self._indices[self._done :], self._workers, pin_memory=False
            )
            self._results = iter(self._loader)
        end = time.monotonic() + _ROUND_S
        results: list[ImageCheck] = []
        while time.monotonic() < end and not stop() and len(results) < self.remaining:
            results.append(next(self._results))
        self._done += len(results)
        return results

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()


class _CheckedImages(torch.utils.data.Dataset[ImageCheck]):
    """Dataset that maps the index of an image to its check."""

    def __init__(self, source: DatasetSource) -> None:
        self._source = source

    def __getitem__(self, index: int) -> ImageCheck:
        return _check_image(self._source, index)


def _check_image(source: Source, index: int) -> ImageCheck:
    return _check_file(source, index) if isinstance(source, EncodedSource) else _check_decoded(source, index)


def _check_file(source: EncodedSource, index: int) -> ImageCheck:
    is_read = False
    try:
        data = source.read(index)
        is_read = True
        _, height, width = decode(data, source.name(index), source.pixels, source.max_pixels).shape
    except UnreachableStorage:
        raise
    except UserError as error:
        no_memory = isinstance(error.__cause__, MemoryError) or "alloc" in str(error.__cause__)
        return ImageCheck(index, 0, 0, reason_of(error, source, index), cacheable=is_read and not no_memory)
    return ImageCheck(index, height, width)


def _check_decoded(source: Source, index: int) -> ImageCheck:
    label = None
    try:
        if isinstance(source, DatasetSource):
            image, label = source.image_and_label(index)
        else:
            assert isinstance(source, DecodedSource)
            image = source.image(index)
    except WrongForm as error:
        return ImageCheck(index, 0, 0, str(error), wrong_form=True)
    except UserError as error:
        return ImageCheck(index, 0, 0, reason_of(error, source, index))
    if not (isinstance(source, DatasetSource) and source.labels_unread):  # the range of values may not be set yet
        try:
            source.pixels.check(image, source.name(index))
        except UserError as error:
            return ImageCheck(index, 0, 0, str(error), wrong_form=True)
    _, height, width = image.shape
    return ImageCheck(index, height, width, label=label)
