"""Our loaders in bench_views.py, and DALI as it is used elsewhere."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from torch import Tensor

from benchmarks.suite import DEVICE, ON_GPU
from benchmarks.view_peers import GRID, Contender, Photos, Setting
from fastsimclr import Views
from fastsimclr.data import open_source, open_views
from fastsimclr.data.dali import DaliFront
from fastsimclr.data.loader import Front, Job
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.torchvision import TorchvisionFront


class OurViews:
    """`open_views`, its batches as pairs."""

    def __init__(self, data: Any, setting: Setting, backend: str) -> None:
        self._loader = open_views(
            str(data.folder) if isinstance(data, Photos) else data,
            setting.views,
            setting.batch_size,
            backend=backend,
            device=DEVICE,
            workers=setting.workers,
            shuffle=setting.shuffle,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._loader:
            yield batch.views

    def close(self) -> None:
        self._loader.close()


class OurCrops:
    """The first half of our loaders: read, decode, crop, resize, flip; by `DaliColours` also the colors."""

    def __init__(self, photos: Photos, setting: Setting, front: type[Front]) -> None:
        source = open_source(str(photos.folder))
        self._sampler = Sampler(len(source), setting.batch_size, 0, 1, 0, setting.shuffle)
        if issubclass(front, DaliFront):
            self._front: Front = front(source, setting.views, DEVICE, setting.batch_size, max(1, setting.workers))
        else:
            self._front = TorchvisionFront(source, setting.views, DEVICE, setting.workers)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch = self._sampler.epoch
        jobs = (Job(self._sampler.seed, epoch, index) for index in self._sampler.remaining())
        for made in self._front.crops(jobs):
            yield tuple(view.permute(0, 3, 1, 2) for view in made.crops)
        self._sampler.epoch = epoch + 1

    def close(self) -> None:
        self._front.close()


def our_views(backend: str) -> Contender:
    return Contender(functools.partial(OurViews, backend=backend), same_draws=True)


def our_crops(front: type[Front], **more: Any) -> Contender:
    return Contender(functools.partial(OurCrops, front=front), same_draws=True, **more)


# DALI as it is used elsewhere


class DaliReader:
    """DALI's own reader and decoder, and `count` results of `make` for each image, as tensors on the device."""

    def __init__(
        self, photos: Photos, setting: Setting, make: Callable[[Any, Views, str], Any], count: int = 2
    ) -> None:
        @pipeline_def(
            batch_size=setting.batch_size,
            num_threads=max(1, setting.workers),
            device_id=0 if ON_GPU else None,
            enable_conditionals=True,
        )
        def graph() -> tuple[object, ...]:
            data, _ = fn.readers.file(
                files=list(photos.files), random_shuffle=setting.shuffle, pad_last_batch=True, name="files"
            )
            images = fn.decoders.image(data, device="mixed" if ON_GPU else "cpu", output_type=types.RGB)
            return tuple(make(images, setting.views, "gpu" if ON_GPU else "cpu") for _ in range(count))

        pipeline = graph()
        pipeline.build()
        self._names = [str(number) for number in range(pipeline.num_outputs)]
        self._iterator = DALIGenericIterator(
            pipeline,
            self._names,
            reader_name="files",
            last_batch_policy=LastBatchPolicy.PARTIAL,
            auto_reset=True,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for (batch,) in self._iterator:
            yield tuple(batch[name].permute(0, 3, 1, 2) for name in self._names)


def dali_grid(images: Any, views: Views, place: str) -> Any:
    return fn.resize(images, size=[GRID] * 2, interp_type=types.INTERP_NN, antialias=False, device=place)


def dali_crop(images: Any, views: Views, place: str) -> Any:
    return fn.random_resized_crop(
        images,
        size=[views.image_size] * 2,
        random_aspect_ratio=list(views.ratio),
        random_area=list(views.scale),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        device=place,
    )


def dali_crop_and_flip(images: Any, views: Views, place: str) -> Any:
    flip = fn.random.coin_flip(probability=views.flip)
    return fn.flip(dali_crop(images, views, place), horizontal=flip, device=place)


def dali_color_twist(images: Any, views: Views, place: str) -> Any:
    """The usual SimCLR graph: two crops, color_twist, blur, normalize.

    One matrix for the whole jitter, in a fixed order, with contrast about 128 and a hue turned in YIQ: its views are
    11.6 levels of 255 off ours at equal draws.
    """
    x = dali_crop(images, views, place)
    jittered = fn.random.coin_flip(probability=views.jitter, dtype=types.BOOL)
    if jittered:
        x = fn.color_twist(
            x,
            brightness=fn.random.uniform(range=(1 - views.brightness, 1 + views.brightness)),
            contrast=fn.random.uniform(range=(1 - views.contrast, 1 + views.contrast)),
            saturation=fn.random.uniform(range=(1 - views.saturation, 1 + views.saturation)),
            hue=fn.random.uniform(range=(-360 * views.hue, 360 * views.hue)),
            device=place,
        )
    grey = fn.random.coin_flip(probability=views.grey, dtype=types.BOOL)
    if grey:
        x = fn.saturation(x, saturation=0.0, device=place)
    blurred = fn.random.coin_flip(probability=views.blur, dtype=types.BOOL)
    if blurred:
        x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=views.blur_sigma), device=place)
    flip = fn.random.coin_flip(probability=views.flip)
    mean, std = ([255 * level for level in levels] for levels in (views.mean, views.std))
    return fn.crop_mirror_normalize(x, mirror=flip, mean=mean, std=std, output_layout="HWC", device=place)


def by_dali(make: Callable[[Any, Views, str], Any], count: int = 2, **more: Any) -> Contender:
    return Contender(functools.partial(DaliReader, make=make, count=count), **more)
