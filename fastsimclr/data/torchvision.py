"""The torchvision backend: decode and crop in the workers of a DataLoader."""

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from fastsimclr.data import native
from fastsimclr.data.arrays import MappedSource
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.crop import crop as crop_batch
from fastsimclr.data.headers import read_header
from fastsimclr.data.images import decode
from fastsimclr.data.loader import BatchRequest, CroppedBatch
from fastsimclr.data.params import ViewParams, sample_batch_params
from fastsimclr.data.pixels import RGB8, PixelFormat
from fastsimclr.data.replacement import read_or_replace
from fastsimclr.data.scaled import crop_exactly, decode_scaled, may_be_scaled
from fastsimclr.data.sources import ArraySource, EncodedSource, Source, decoded
from fastsimclr.data.workers import WorkerLoader, uses_shared_memory
from fastsimclr.distributed import local_world_size
from fastsimclr.errors import UserError
from fastsimclr.profiling import stage


class TorchvisionBackend:
    """Crop backend that decodes each image once with torchvision.io and crops its views with transforms.v2."""

    def __init__(self, source: Source, augmentation: Augmentation, device: torch.device, workers: int) -> None:
        self.device = device
        # A worker gets every workers-th request. It is told the images of its next one, whose reads begin before.
        self._ahead = max(1, workers) if source.parallel_reads > 1 else 0
        self._requests: Iterator[_Task] = iter(())
        self._loader: WorkerLoader[CroppedBatch | UserError] = WorkerLoader(
            _Crops(source, augmentation), self, workers, pin_memory=device.type == "cuda"
        )

    def __iter__(self) -> "Iterator[_Task]":
        """Yield the requests, as the sampler of the DataLoader."""
        return self._requests

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        self._requests = _with_next(requests, self._ahead)
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            if self.device.type == "cpu":
                yield batch
                continue
            with stage("copy"):
                crops = tuple(view.to(self.device, non_blocking=True) for view in batch.crops)
            yield batch._replace(crops=crops)

    def device_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._loader.close()


_Task = tuple[BatchRequest, NDArray[np.int64]]  # a request, and the images to read next


def _with_next(requests: Iterator[BatchRequest], ahead: int) -> Iterator[_Task]:
    """Yield each request with the images of the one that comes `ahead` later; none if `ahead` is 0."""
    none = np.empty(0, np.int64)
    queue: deque[BatchRequest] = deque()
    for request in requests:
        queue.append(request)
        if len(queue) > ahead:
            yield queue.popleft(), request.index if ahead else none
    while queue:
        yield queue.popleft(), none


class _Crops(Dataset[CroppedBatch | UserError]):
    """Dataset that maps a request to its batch. It returns a UserError instead of raising it."""

    def __init__(self, source: Source, augmentation: Augmentation) -> None:
        if isinstance(source, ArraySource):
            with uses_shared_memory():
                source.images.share_memory_()  # workers get a handle, not a copy
        self.source, self.augmentation = source, augmentation

    def __getitem__(self, task: _Task) -> CroppedBatch | UserError:
        request, following = task
        if isinstance(self.source, EncodedSource):
            planned = [index for index in (*request.index.tolist(), *following.tolist()) if index not in request.bad]
            self.source.plan_reads(planned)
        crops: list[list[Tensor]] = []
        params: list[list[ViewParams]] = []
        used = request.index.copy()
        bad: dict[int, str] = {}
        for row in range(len(used)):
            read = partial(self._crops, request=request, row=row)
            try:
                used[row], (image_crops, image_params), found = read_or_replace(request, row, len(self.source), read)
            except UserError as error:
                return error  # raised in a worker, it would be wrapped in a traceback
            bad |= found
            crops.append(image_crops)
            params.append(image_params)
        # In a worker, default_collate stacks into shared memory.
        views = tuple(default_collate(list(view)) for view in zip(*crops, strict=True))
        return CroppedBatch(views, [np.concatenate(view) for view in zip(*params, strict=True)], used, bad)

    def _crops(self, index: int, request: BatchRequest, row: int) -> tuple[list[Tensor], list[ViewParams]]:
        """Return each view's crop (S, S, C) of image `index`, and its parameters (1,) for a row of the request.

        Raises UserError.
        """
        source, recipes = self.source, self.augmentation.recipes

        def sample(size: Sequence[int]) -> list[ViewParams]:
            wanted, sizes = request.index[row : row + 1], np.array([size])
            return sample_batch_params(self.augmentation, request.seed, request.epoch, wanted, sizes)

        if isinstance(source, EncodedSource) and source.pixels == RGB8:
            data, name = source.read(index), source.name(index)
            header = read_header(data, name)
            header.check_pixels(source.max_pixels, name)
            params = sample(header.upright_size)
            if may_be_scaled(source, header) and (scaled := decode_scaled(data, header, self.augmentation, params)):
                crops = [
                    crop_exactly(scaled.image, recipe, box, each["flip"][0])
                    for recipe, box, each in zip(recipes, scaled.boxes, params, strict=True)
                ]
                return crops, params
            image = decode(data, name, header=header)
        else:
            image = decoded(source, index)
            params = sample(image.shape[1:])
        return [crop(image, recipe, each, source.pixels) for recipe, each in zip(recipes, params, strict=True)], params


def crop(image: Tensor, recipe: Augmentation, params: ViewParams, pixels: PixelFormat = RGB8) -> Tensor:
    """Crop, resize and flip an image (C, h, w) of the format `pixels` to (S, S, C). params: (1,), of this view.

    The result is uint8 for 8-bit RGB, otherwise float32 in [0, 1].
    """
    if pixels != RGB8 and native.is_compiled(image.device):  # four times as fast as the resize of torchvision
        return crop_batch(image.permute(1, 2, 0)[None], np.zeros(1, np.int64), params, recipe, pixels=pixels)[0]
    cropped = TF.crop(image, *params["box"][0].tolist())[None]
    if pixels == RGB8:
        # Like v2.functional.resized_crop, but the resize gets contiguous channels-last memory: it is then a third
        # faster, and its result needs no copy.
        cropped = cropped.contiguous(memory_format=torch.channels_last)
    else:
        cropped = cropped.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # changed in place
    size = [recipe.image_size, recipe.image_size]
    view = TF.resize(cropped, size, InterpolationMode(recipe.interpolation), antialias=True)
    if params["flip"][0]:
        view = TF.horizontal_flip(view)
    view = view[0].permute(1, 2, 0).contiguous()
    return view if pixels == RGB8 else pixels.to_unit_(view)


def default_workers(source: Source, device: torch.device) -> int:
    """Return the default number of workers: 0 for arrays, 1 on a CPU, else the rank's cores - 1, 1 to 16."""
    if isinstance(source, ArraySource | MappedSource):
        return 0
    if device.type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) // local_world_size()
    return max(1, min(16, cores - 1))
