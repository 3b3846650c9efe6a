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
from fastsimclr.data.sources import ArraySource, Source, decoded
from fastsimclr.errors import UserError
from fastsimclr.profiling import stage

_MAX_SIDE = 96  # pixels (STL-10's): for larger images crops are cheap compared to decoding, and few datasets fit
_MAX_BYTES = 4 << 30


def fits_in_memory(source: Source) -> bool:
    """Return whether to keep the images decoded. False if their sizes are unknown, as without a scan."""
    if isinstance(source, ArraySource):
        return max(source.images.shape[1:3]) <= _MAX_SIDE and source.images.nbytes <= _MAX_BYTES
    sizes = source.sizes
    if sizes is None or not (sizes == sizes[0]).all():
        return False
    return sizes[0].max() <= _MAX_SIDE and source.pixels.image_bytes(*sizes[0]) * len(sizes) <= _MAX_BYTES


def decode_all(source: Source) -> ArraySource:
    """Decode all images. Raises UserError if they differ in size or one does not decode."""

    def decode_one(index: int) -> torch.Tensor:
        return decoded(source, index).permute(1, 2, 0)

    first = decode_one(0)
    images = first.new_empty(len(source), *first.shape)

    def store(index: int) -> None:
        image = decode_one(index)
        if image.shape != first.shape:
            raise UserError(
                f"{source.name(index)}: got {image.shape[0]}x{image.shape[1]} pixels, expected {first.shape[0]}x"
                f"{first.shape[1]} as for {source.name(0)}: backend memory needs images of one size"
            )
        images[index] = image

    cores = len(os.sched_getaffinity(0)) if source.thread_safe else 1
    with ThreadPoolExecutor(cores, thread_name_prefix="fastsimclr-decode") as threads:
        try:
            for _ in threads.map(store, range(len(source))):
                pass
        except UserError:
            threads.shutdown(cancel_futures=True)
            raise
    return ArraySource("decoded", images, source.labels, source.classes, source)


class MemoryBackend:
    """Crop backend for images kept in one tensor on the device."""

    def __init__(self, source: ArraySource, augmentation: Augmentation, device: torch.device) -> None:
        self.augmentation, self.pixels = augmentation, source.pixels
        self.images = source.images.to(device).contiguous()  # (N, h, w, C)

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        for request in requests:
            with stage("views"):
                sizes = np.tile(self.images.shape[1:3], (len(request.index), 1))
                params = sample_batch_params(self.augmentation, *request, sizes)
                views = zip(params, self.augmentation.recipes, strict=True)
                crops = tuple(
                    crop(self.images, request.index, view_params, recipe, pixels=self.pixels)
                    for view_params, recipe in views
                )
            yield CroppedBatch(crops, params)

    def device_bytes(self) -> int:
        return self.images.nbytes

    def close(self) -> None:
        pass
