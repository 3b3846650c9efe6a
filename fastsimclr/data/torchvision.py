"""Decoding and cropping by torchvision in a DataLoader's workers."""

import os
import signal
import sys
import threading
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.context import BaseContext

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.images import decode
from fastsimclr.data.loader import BatchRequest, CroppedBatch
from fastsimclr.data.params import ViewParams, sample_batch_params
from fastsimclr.data.sources import ArraySource, EncodedSource, Source
from fastsimclr.errors import UserError
from fastsimclr.profiling import stage


class TorchvisionBackend:
    """Images decoded once each by torchvision.io, each view cropped and resized by transforms.v2 on uint8 tensors."""

    def __init__(self, source: Source, augmentation: Augmentation, device: torch.device, workers: int) -> None:
        self.device = device
        self._requests: Iterator[BatchRequest] = iter(())
        self._loader: DataLoader[CroppedBatch | UserError] = DataLoader(
            _Crops(source, augmentation),
            sampler=self,  # type: ignore[arg-type]  # an iterable of keys
            batch_size=None,  # a key is a job, and what it becomes is a batch
            collate_fn=_no_collate,  # type: ignore[arg-type]  # typed for lists of items
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            multiprocessing_context=_forkserver() if workers else None,
            worker_init_fn=_exit_with_parent,
        )
        # At exit, too, and before multiprocessing's own way, which is to wait for what it has sent SIGTERM.
        self._stop_workers = weakref.finalize(self, _stop_workers, self._loader)

    def __iter__(self) -> Iterator[BatchRequest]:
        """The DataLoader's sampler."""
        return self._requests

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        self._requests = requests
        with _without_main_module():  # workers are started here
            batches = iter(self._loader)
        for made in batches:
            if isinstance(made, UserError):
                raise made
            if self.device.type == "cpu":
                yield made
                continue
            with stage("copy"):
                crops = tuple(view.to(self.device, non_blocking=True) for view in made.crops)
            yield CroppedBatch(crops, made.params)

    def device_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._stop_workers()


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""A terminal or a scheduler sends them to the whole group; the parent wants batches until it has stopped."""


def _forkserver() -> BaseContext:
    """Workers as forks of a process that has done this file's imports, and nothing else.

    Forks of this one would copy locked locks of the threads of torch and of DALI. Spawned ones take 370 MiB each, and
    seconds, for imports; those of one forkserver share them.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()  # before, as it unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # which the forkserver inherits
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep multiprocessing from importing the main script again in each worker, which needs nothing from it.

    A script without `if __name__ == "__main__":` would otherwise open its loader again in every worker, and fail there.
    """
    main = sys.modules["__main__"]
    hidden = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    vars(main).pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def _exit_with_parent(_: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def end_with_it() -> None:
        """DataLoader's own watch is on the forkserver, which lives as long as there are workers."""
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def _stop_workers(loader: "DataLoader[CroppedBatch | UserError]") -> None:
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


class _Crops(Dataset[CroppedBatch | UserError]):
    """Maps a job to its batch."""

    def __init__(self, source: Source, augmentation: Augmentation) -> None:
        if isinstance(source, ArraySource):
            source.images.share_memory_()  # workers get a handle, not a copy
        self.source, self.augmentation = source, augmentation

    def __getitem__(self, request: BatchRequest) -> CroppedBatch | UserError:
        recipes = self.augmentation.recipes
        crops: list[list[Tensor]] = [[] for _ in recipes]
        params: list[list[ViewParams]] = [[] for _ in recipes]
        for i in range(len(request.index)):
            part = request.index[i : i + 1]
            try:
                image = decoded(self.source, int(part[0]))
            except UserError as error:
                return error  # raised in a worker, it would come back wrapped in its traceback
            drawn = sample_batch_params(
                self.augmentation, request.seed, request.epoch, part, np.array([image.shape[1:]])
            )
            for view, recipe in enumerate(recipes):
                params[view].append(drawn[view])
                crops[view].append(crop(image, recipe, drawn[view]))
        # default_collate stacks into shared memory where this is a worker.
        return CroppedBatch(tuple(map(default_collate, crops)), [np.concatenate(of_view) for of_view in params])


def decoded(source: Source, index: int) -> Tensor:
    """Image `index` as (3, H, W) uint8."""
    if isinstance(source, ArraySource):
        return source.images[index].permute(2, 0, 1)
    assert isinstance(source, EncodedSource)
    return decode(source.read(index), source.name(index))


def crop(image: Tensor, recipe: Augmentation, params: ViewParams) -> Tensor:
    """The view (S, S, 3) of an image (3, h, w), both uint8, before its colours change. draws: (1,), of this image."""
    # As v2.functional.resized_crop, but that the resize gets the piece in one block of channels-last memory: it is then
    # a third faster, and its result needs no copy.
    piece = TF.crop(image, *params["box"][0].tolist())[None].contiguous(memory_format=torch.channels_last)
    size = [recipe.image_size, recipe.image_size]
    view = TF.resize(piece, size, InterpolationMode(recipe.interpolation), antialias=True)
    if params["flip"][0]:
        view = TF.horizontal_flip(view)
    return view[0].permute(1, 2, 0).contiguous()


def _no_collate(batch: CroppedBatch | UserError) -> CroppedBatch | UserError:
    return batch


def default_workers(source: Source, device: torch.device) -> int:
    """Worker processes that pay: none for small decoded images, one beside training on a CPU, else the rank's cores."""
    if isinstance(source, ArraySource):
        return 0
    if device.type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, cores - 1))
