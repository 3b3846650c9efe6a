"""Images of one size, decoded and kept on the device: a whole batch is cropped at once, with no worker at all."""

import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.crop import crop
from fastsimclr.data.images import decode
from fastsimclr.data.loader import BatchRequest, CroppedBatch
from fastsimclr.data.params import sample_batch_params
from fastsimclr.data.sources import ArraySource, EncodedSource
from fastsimclr.errors import UserError
from fastsimclr.profiling import stage

_MAX_SIDE = 96  # STL-10's: of larger images crops are cheap beside decoding, and few sets of them fit
_MAX_BYTES = 4 << 30


def fits_in_memory(source: EncodedSource) -> bool:
    """Whether to keep these images decoded; False without a scan, which alone knows their sizes."""
    sizes = source.sizes
    if sizes is None or not (sizes == sizes[0]).all():
        return False
    return sizes[0].max() <= _MAX_SIDE and 3 * int(sizes[0].prod()) * len(sizes) <= _MAX_BYTES


def decode_all(source: EncodedSource) -> ArraySource:
    """The same images, decoded by all cores. Raises UserError if they are not of one size, or one does not decode."""

    def pixels(index: int) -> torch.Tensor:
        return decode(source.read(index), source.name(index)).permute(1, 2, 0)

    first = pixels(0)
    images = first.new_empty(len(source), *first.shape)

    def put(index: int) -> None:
        image = pixels(index)
        if image.shape != first.shape:
            raise UserError(
                f"{source.name(index)}: got {image.shape[0]}x{image.shape[1]} pixels, expected {first.shape[0]}x"
                f"{first.shape[1]} as {source.name(0)}: backend memory takes images of one size"
            )
        images[index] = image

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="fastsimclr-decode") as threads:
        try:
            for _ in threads.map(put, range(len(source))):
                pass
        except UserError:
            threads.shutdown(cancel_futures=True)
            raise
    return ArraySource("decoded", images, source.labels, source.classes, source)


class MemoryBackend:
    """Crops out of one array."""

    def __init__(self, source: ArraySource, augmentation: Augmentation, device: torch.device) -> None:
        self.augmentation = augmentation
        self.images = source.images.to(device)  # (N, h, w, 3) uint8

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        for request in requests:
            with stage("views"):
                sizes = np.tile(self.images.shape[1:3], (len(request.index), 1))
                params = sample_batch_params(self.augmentation, *request, sizes)
                drawn = zip(params, self.augmentation.recipes, strict=True)
                crops = tuple(crop(self.images, request.index, of_view, recipe) for of_view, recipe in drawn)
            yield CroppedBatch(crops, params)

    def device_bytes(self) -> int:
        return self.images.nbytes

    def close(self) -> None:
        pass
