"""The backend for small images of one size: decoded once and kept on the device, cropped a batch at a time."""

import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.crop import crop
from fastsimclr.data.loader import BatchRequest, CroppedBatch
from fastsimclr.data.params import sample_batch_params
from fastsimclr.data.replacement import read_or_replace
from fastsimclr.data.sources import ArraySource, Source, WrongForm, decoded, reason_of
from fastsimclr.errors import UserError
from fastsimclr.profiling import stage

_MAX_SIDE = 96  # pixels (STL-10's): for larger images crops are cheap compared to decoding, and few datasets fit
_MAX_BYTES = 4 << 30


class DifferentSizes(UserError):
    """The images are not of one size, as the memory backend needs them."""


def fits_in_memory(source: Source) -> bool:
    """Return whether to keep the images decoded. False if their sizes are unknown, as without a scan."""
    if isinstance(source, ArraySource):
        return max(source.images.shape[1:3]) <= _MAX_SIDE and source.images.nbytes <= _MAX_BYTES
    sizes = source.sizes
    if sizes is None or not (sizes == sizes[0]).all():
        return False
    return sizes[0].max() <= _MAX_SIDE and source.pixels.image_bytes(*sizes[0]) * len(sizes) <= _MAX_BYTES


def decode_all(source: Source) -> ArraySource:
    """Decode all images; those that cannot be used are `bad`, and black.

    Raises DifferentSizes if the others differ in size, and UserError if none can be used.
    """
    bad = dict(source.bad)

    def decode_one(index: int) -> torch.Tensor | None:
        if index not in bad:
            try:
                return decoded(source, index).permute(1, 2, 0)
            except WrongForm:
                raise
            except UserError as error:
                bad[index] = reason_of(error, source, index)
        return None

    every = range(len(source))
    first, example = next(((i, image) for i in every if (image := decode_one(i)) is not None), (0, None))
    if example is None:
        raise UserError(f"data: got {len(source)} images, none of which can be used: {source.name(0)}: {bad[0]}")
    images = example.new_zeros(len(source), *example.shape)

    def store(index: int) -> None:
        image = decode_one(index)
        if image is None:
            return
        if image.shape != images.shape[1:]:
            raise DifferentSizes(
                f"{source.name(index)}: got {image.shape[0]}x{image.shape[1]} pixels, expected {images.shape[1]}x"
                f"{images.shape[2]} as for {source.name(first)}: backend memory needs images of one size"
            )
        images[index] = image

    cores = len(os.sched_getaffinity(0)) if source.thread_safe else 1
    with ThreadPoolExecutor(cores, thread_name_prefix="fastsimclr-decode") as threads:
        try:
            for _ in threads.map(store, every):
                pass
        except UserError:
            threads.shutdown(cancel_futures=True)
            raise
    in_memory = ArraySource("decoded", images, source.labels, source.classes, source)
    in_memory.bad = bad
    return in_memory


class MemoryBackend:
    """Crop backend for images kept in one tensor on the device."""

    def __init__(self, source: ArraySource, augmentation: Augmentation, device: torch.device) -> None:
        self.augmentation, self.pixels = augmentation, source.pixels
        self.images = source.images.to(device).contiguous()  # (N, h, w, C)

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        for request in requests:
            with stage("views"):
                used = request.index.copy()
                for row in np.flatnonzero(np.isin(used, list(request.bad))):
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
