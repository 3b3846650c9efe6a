"""Decoding and cropping by torchvision in a DataLoader's workers."""

import os
import signal
from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from fastsimclr.data.draws import Draws, draw_views
from fastsimclr.data.images import decode
from fastsimclr.data.loader import Cropped, Job
from fastsimclr.data.sources import ArraySource, EncodedSource, Source
from fastsimclr.errors import UserError
from fastsimclr.views import Views


class TorchvisionFront:
    """Images decoded once each by torchvision.io, each view cropped and resized by transforms.v2 on uint8 tensors."""

    def __init__(self, source: Source, views: Views, device: torch.device, workers: int) -> None:
        self.device = device
        self._jobs: Iterator[Job] = iter(())
        self._loader: DataLoader[Cropped | UserError] = DataLoader(
            _Crops(source, views),  # type: ignore[arg-type]  # a batch's type, not an item's
            batch_sampler=self,  # type: ignore[arg-type]  # an iterable of batches of keys
            collate_fn=_collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            # Not fork: it copies locked locks of the threads of torch and of DALI. Not forkserver: its workers do not
            # notice that the process they work for was killed, and live on.
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_leave_signals_to_the_parent,
        )

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """The DataLoader's batch sampler: a key is a job of one image."""
        for job in self._jobs:
            yield [(job.seed, job.epoch, index) for index in job.index.tolist()]

    def crops(self, jobs: Iterator[Job]) -> Generator[Cropped, None, None]:
        self._jobs = jobs
        for made in self._loader:
            if isinstance(made, UserError):
                raise made
            yield Cropped(tuple(view.to(self.device, non_blocking=True) for view in made.crops), made.draws)

    def device_bytes(self) -> int:
        return 0

    def close(self) -> None:
        iterator = self._loader._iterator
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        self._loader._iterator = None


class _Crops(Dataset[Cropped | UserError]):
    """Maps a key to the image's crops, (H, W, 3) uint8 of each view, and the draws (1,)."""

    def __init__(self, source: Source, views: Views) -> None:
        if isinstance(source, ArraySource):
            source.images.share_memory_()  # workers get a handle, not a copy
        self.source, self.views = source, views

    def __getitem__(self, key: tuple[int, int, int]) -> Cropped | UserError:
        seed, epoch, index = key
        try:
            image = decoded(self.source, index)
        except UserError as error:
            return error  # raised in a worker, it would come back wrapped in its traceback
        draws = draw_views(self.views, seed, epoch, np.array([index]), np.array([image.shape[1:]]))
        drawn = zip(draws, self.views.recipes, strict=True)
        return Cropped(tuple(crop(image, recipe, of_view) for of_view, recipe in drawn), draws)


def decoded(source: Source, index: int) -> Tensor:
    """Image `index` as (3, H, W) uint8."""
    if isinstance(source, ArraySource):
        return source.images[index].permute(2, 0, 1)
    assert isinstance(source, EncodedSource)
    return decode(source.read(index), source.name(index))


def crop(image: Tensor, recipe: Views, draws: Draws) -> Tensor:
    """The view (S, S, 3) of an image (3, h, w), both uint8, before its colours change. draws: (1,), of this image."""
    size = [recipe.image_size, recipe.image_size]
    box = draws["box"][0].tolist()
    view = TF.resized_crop(image, *box, size, InterpolationMode(recipe.interpolation), antialias=True)
    if draws["flip"][0]:
        view = TF.horizontal_flip(view)
    return view.permute(1, 2, 0).contiguous()


def _leave_signals_to_the_parent(_: int) -> None:
    """A terminal or a scheduler signals the whole group; the parent still wants batches until it has stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collate(items: list[Cropped | UserError]) -> Cropped | UserError:
    """One batch of single images, or the first error among them."""
    images = []
    for item in items:
        if isinstance(item, UserError):
            return item
        images.append(item)
    crops, draws = zip(*images, strict=True)
    return Cropped(
        tuple(torch.stack(of_view) for of_view in zip(*crops, strict=True)),
        [np.concatenate(of_view) for of_view in zip(*draws, strict=True)],
    )


def default_workers(source: Source, device: torch.device) -> int:
    """Worker processes that pay: none for small decoded images, one beside training on a CPU, else the rank's cores."""
    if isinstance(source, ArraySource):
        return 0
    if device.type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, cores - 1))
