"""The backend for small images of one size: decoded once and kept on the device, cropped a batch at a time."""

import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray

from fastsimclr.data.arrays import MappedSource
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.checks import Stopped
from fastsimclr.data.crop import crop
from fastsimclr.data.headers import read_header
from fastsimclr.data.loader import BatchRequest, CroppedBatch
from fastsimclr.data.params import sample_batch_params
from fastsimclr.data.replacement import read_or_replace
from fastsimclr.data.sources import ArraySource, EncodedSource, Source, WrongForm, decoded, reason_of
from fastsimclr.data.storage import UnreachableStorage
from fastsimclr.errors import UserError
from fastsimclr.profiling import stage
from fastsimclr.progress_bar import progress_bar

_MAX_SIDE = 96  # pixels (STL-10's): for larger images crops are cheap compared to decoding, and few datasets fit
_MAX_BYTES = 4 << 30
_SAMPLE = 64  # images whose sizes are read
_PROGRESS_AFTER_S = 2.0


def fits_in_memory(source: Source) -> bool:
    """Return whether to keep the images decoded: they are small, of one size as far as known, and fit.

    If no size is known, those of a random sample are read, up to the first that rules it out.
    """
    if isinstance(source, ArraySource):
        return max(source.images.shape[1:3]) <= _MAX_SIDE and source.images.nbytes <= _MAX_BYTES
    if isinstance(source, MappedSource):
        return False
    size = _one_size(source)
    return size is not None and source.pixels.image_bytes(*size) * len(source) <= _MAX_BYTES


def _one_size(source: Source) -> tuple[int, int] | None:
    """Return the size (h, w) of small images that all known or sampled ones have; None if there is none."""
    if source.sizes is not None and source.sizes.any():
        known = source.sizes[source.sizes[:, 0] > 0]
        height, width = known[0].tolist()
        return (height, width) if known.max() <= _MAX_SIDE and (known == known[0]).all() else None
    one_size = None
    for index in np.random.default_rng(0).permutation(len(source))[:_SAMPLE].tolist():
        try:
            if isinstance(source, EncodedSource):
                height, width = read_header(source.read(index), source.name(index)).upright_size
            else:
                _, height, width = decoded(source, index).shape
        except UnreachableStorage:
            raise
        except UserError:  # the image is replaced when it is met
            continue
        if max(height, width) > _MAX_SIDE or one_size not in (None, (height, width)):
            return None
        one_size = height, width
    return one_size


class DifferentSizes(UserError):
    """The images are of several sizes. sizes: (N, 2), of the two images that differ; 0 for the others."""

    def __init__(self, message: str, sizes: NDArray[np.int32]) -> None:
        super().__init__(message)
        self.sizes = sizes


def decode_all(source: Source, *, visible: bool = True) -> ArraySource:
    """Decode all images, and return them with `bad` set: images that do not decode are zeros.

    visible: whether to show progress.
    Raises DifferentSizes (a UserError), WrongForm, and UserError if no image decodes.
    """

    def decode_one(index: int) -> torch.Tensor | None:
        if index in source.bad:
            return None
        try:
            return decoded(source, index).permute(1, 2, 0)
        except (WrongForm, UnreachableStorage):
            raise
        except UserError as error:
            bad[index] = reason_of(error, source, index)
            return None

    bad = dict(source.bad)
    named, first = next(
        ((index, image) for index in range(len(source)) if (image := decode_one(index)) is not None), (0, None)
    )
    if first is None:
        raise UserError(f"data: got {len(bad)} images that cannot be used, the first with: {source.name(0)}: {bad[0]}")
    images = first.new_zeros(len(source), *first.shape)

    def store(index: int) -> None:
        image = decode_one(index)
        if image is None:
            return
        if image.shape != first.shape:
            sizes = np.zeros((len(source), 2), np.int32)
            sizes[named], sizes[index] = first.shape[:2], image.shape[:2]
            raise DifferentSizes(
                f"{source.name(index)}: got {image.shape[0]}x{image.shape[1]} pixels, expected {first.shape[0]}x"
                f"{first.shape[1]} as for {source.name(named)}: backend memory needs images of one size",
                sizes,
            )
        images[index] = image

    threads = max(len(os.sched_getaffinity(0)), source.parallel_reads) if source.thread_safe else 1
    progress = progress_bar(len(source), "decoding images", "image", visible=visible, delay=_PROGRESS_AFTER_S)
    with closing(progress), ThreadPoolExecutor(threads, thread_name_prefix="fastsimclr-decode") as pool:
        try:
            for _ in pool.map(store, range(len(source))):
                progress.update()
        except (UserError, Stopped):
            pool.shutdown(cancel_futures=True)
            raise
    array = ArraySource("decoded", images, source.labels, source.classes, source)
    array.bad = dict(sorted(bad.items()))
    return array


class MemoryBackend:
    """Crop backend for images kept in one tensor on the device."""

    def __init__(self, source: ArraySource, augmentation: Augmentation, device: torch.device) -> None:
        self.augmentation, self.pixels = augmentation, source.pixels
        self.images = source.images.to(device).contiguous()  # (N, h, w, C)

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        for request in requests:
            with stage("views"):
                used = request.index.copy()
                for row in np.flatnonzero(np.isin(used, list(request.bad))) if request.bad else ():
                    used[row] = read_or_replace(request, int(row), len(self.images), lambda index: None)[0]
                sizes = np.tile(self.images.shape[1:3], (len(used), 1))
                params = sample_batch_params(self.augmentation, request.seed, request.epoch, request.index, sizes)
                views = zip(params, self.augmentation.recipes, strict=True)
                crops = tuple(
                    crop(self.images, used, view_params, recipe, pixels=self.pixels) for view_params, recipe in views
                )
            yield CroppedBatch(crops, params, used, {})

    def device_bytes(self) -> int:
        return self.images.nbytes

    def close(self) -> None:
        pass
