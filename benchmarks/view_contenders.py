"""Who makes two augmented views of each image in bench_views.py: our loaders, and DALI as it is used elsewhere.

Other packages', torchvision's among them, are in view_peers.py. A contender is opened on photographs and then is an
iterable over epochs of batches, as a user would write it: `for first, second in loader`. Each has three stages: decode
(a grid of pixels of each decoded image is handed on), crops (uint8), and views, the whole recipe.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from torch import Tensor

from benchmarks.dali_colours import DaliColours
from fastsimclr import Views
from fastsimclr.data import open_source, open_views
from fastsimclr.data.dali import DaliFront
from fastsimclr.data.loader import Front, Job
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.sources import Source
from fastsimclr.data.torchvision import TorchvisionFront

GRID = 8  # pixels a side that the decoding stage hands on: whole images are of many sizes, and no recipe hands them on


@dataclass(frozen=True)
class Photos:
    """The same photographs as contenders read them: files of one folder, and as many tar shards as workers."""

    folder: Path
    files: tuple[str, ...]
    shards: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Setting:
    """How a contender is opened. workers: processes or threads; 0 for none. cores: what the machine has."""

    views: Views
    batch_size: int
    workers: int
    device: str
    cores: int = 1
    shuffle: bool = True


Loader = Iterable[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Contender:
    """open: makes the loader. ours: its draws are ours, so that equal seeds give equal views.

    requires: the package without which it is missing. recipe: what it has fixed of the recipe, for comparison.
    slow: has one copy of the images where others have several. differs: why it is another function; then it is not
    held to be the same. note: what else to know of it.
    """

    open: Callable[[Any, Setting], Loader]
    ours: bool = False
    requires: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    slow: bool = False
    differs: str = ""
    note: str = ""


class OurViews:
    """`open_views`, its batches as pairs."""

    def __init__(self, data: Photos | Source, setting: Setting, backend: str) -> None:
        self._loader = open_views(
            str(data.folder) if isinstance(data, Photos) else data,
            setting.views,
            setting.batch_size,
            backend=backend,
            device=setting.device,
            workers=setting.workers,
            shuffle=setting.shuffle,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._loader:
            yield batch.views

    def close(self) -> None:
        self._loader.close()


class OurCrops:
    """The first half of our loaders: read, decode, crop, resize, flip. With `colours` (DaliColours' kind) the colours,
    too, in DALI's own graph."""

    def __init__(self, photos: Photos, setting: Setting, backend: str, colours: str = "") -> None:
        source = open_source(str(photos.folder))
        self._sampler = Sampler(len(source), setting.batch_size, 0, 1, 0, setting.shuffle)
        device = torch.device(setting.device)
        self._front: Front
        if backend == "torchvision":
            self._front = TorchvisionFront(source, setting.views, device, setting.workers)
        else:
            how = source, setting.views, device, setting.batch_size, max(1, setting.workers)
            self._front = DaliColours(colours, *how) if colours else DaliFront(*how)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch = self._sampler.epoch
        jobs = (Job(self._sampler.seed, epoch, index) for index in self._sampler.remaining())
        for made in self._front.crops(jobs):
            yield tuple(view.permute(0, 3, 1, 2) for view in made.crops)
        self._sampler.epoch = epoch + 1

    def close(self) -> None:
        self._front.close()


class DaliReader:
    """DALI's own reader and decoder, and what `outputs` makes of the images, as tensors on `device`."""

    def __init__(self, photos: Photos, setting: Setting, outputs: Callable[[object, str], tuple[object, ...]]) -> None:
        on_gpu = setting.device == "cuda"

        @pipeline_def(
            batch_size=setting.batch_size,
            num_threads=max(1, setting.workers),
            device_id=0 if on_gpu else None,
            enable_conditionals=True,
        )
        def graph() -> tuple[object, ...]:
            data, _ = fn.readers.file(
                files=list(photos.files), random_shuffle=setting.shuffle, pad_last_batch=True, name="files"
            )
            images = fn.decoders.image(data, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
            return outputs(images, "gpu" if on_gpu else "cpu")

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


def dali_decode(photos: Photos, setting: Setting) -> Loader:
    def grid(images: object, place: str) -> tuple[object, ...]:
        return (fn.resize(images, size=[GRID] * 2, interp_type=types.INTERP_NN, antialias=False, device=place),)

    return DaliReader(photos, setting, grid)


def dali_crop(images: object, views: Views, place: str) -> object:
    return fn.random_resized_crop(
        images,
        size=[views.image_size] * 2,
        random_aspect_ratio=list(views.ratio),
        random_area=list(views.scale),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        device=place,
    )


def dali_crops(photos: Photos, setting: Setting) -> Loader:
    def crop_and_flip(images: object, place: str) -> object:
        flip = fn.random.coin_flip(probability=setting.views.flip)
        return fn.flip(dali_crop(images, setting.views, place), horizontal=flip, device=place)

    return DaliReader(photos, setting, lambda images, place: tuple(crop_and_flip(images, place) for _ in range(2)))


def dali_color_twist(photos: Photos, setting: Setting) -> Loader:
    """DALI's own reader and operators, the usual SimCLR graph: one decode, two crops, color_twist, blur, normalise."""
    views = setting.views
    levels = [255 * x for x in views.mean], [255 * x for x in views.std]

    def view(images: object, place: str) -> object:
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
        return fn.crop_mirror_normalize(
            x, mirror=flip, mean=levels[0], std=levels[1], output_layout="HWC", device=place
        )

    return DaliReader(photos, setting, lambda images, place: (view(images, place), view(images, place)))
