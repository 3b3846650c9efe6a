"""Our loaders in bench_views.py, DALI as it is used elsewhere, and how all loaders are compared.

All are opened on the same images, timed in alternation, and checked to make the same views. Ours are compared at the
whole recipe, as equal seeds draw equal views. Rivals draw on their own: they are compared where the recipe leaves
nothing to chance, which is reading, decoding, resizing, flipping, blurring and normalizing.
"""

import functools
import gc
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from torch import Tensor

from benchmarks.memory import most_mib, settle_heap, trimmed_mib
from benchmarks.suite import CORES, DEVICE, ON_GPU, SMALL, Check, Suite, one_line
from benchmarks.view_peers import GRID, Contender, Loader, Photos, Setting
from fastsimclr import Augmentation
from fastsimclr.data import open_source, open_views
from fastsimclr.data.dali import DaliBackend
from fastsimclr.data.loader import BatchRequest, CropBackend
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.torchvision import TorchvisionBackend

PIXELS_BOUND = 1.5  # mean levels of 255, between two loaders of ours: tests/data/test_loaders.py
ROUNDS = 2 if SMALL else 5
WORKERS = min(16, CORES)


@dataclass(frozen=True)
class Images:
    """What contenders are opened on: an epoch, a slow contender's epoch, and a few of a ratio of 4 to 3."""

    whole: Any
    once: Any
    few: Any
    origin: str


class Opened:
    """A contender's loader, of which an epoch has run. side, dtype: of each view that a batch has to consist of."""

    def __init__(self, contender: Contender, setting: Setting, data: Images, side: int, dtype: torch.dtype) -> None:
        if contender.requires:
            importlib.import_module(contender.requires)  # else its imports are in its memory
        images = data.once if contender.slow else data.whole
        before = trimmed_mib()
        self.side, self.dtype, self.images = side, dtype, len(images)
        self.loader = open_on(contender, images, setting)
        self.peak_mib = most_mib(self.epoch) - before

    def epoch(self) -> None:
        seen = 0
        for batch in self.loader:
            for view in batch:
                assert view.shape[1:] == (3, self.side, self.side)
                assert view.dtype == self.dtype
                view.to(DEVICE, non_blocking=True)
            seen += len(batch[0])
        assert seen == self.images


def open_on(contender: Contender, images: Any, setting: Setting) -> Loader:
    return contender.open(images, replace(setting, batch_size=min(setting.batch_size, len(images))))


def close(loader: Loader) -> None:
    getattr(loader, "close", lambda: None)()


def levels(view: Tensor, augmentation: Augmentation) -> Tensor:
    """A view's pixels in levels of 255, float32 on the CPU, from uint8 or from normalized ones."""
    view = view.detach().cpu()
    if view.dtype == torch.uint8:
        return view.float()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (augmentation.mean, augmentation.std))
    return (view.float() * std + mean) * 255


def pixels_apart(some: Loader, others: Loader, augmentation: Augmentation) -> float:
    """Mean difference in levels of 255 of two unshuffled loaders' views. Both have to show as many."""
    total, pixels = 0.0, 0
    for left, right in itertools.zip_longest(some, others, fillvalue=()):
        for a, b in zip(left, right, strict=True):
            total += float((levels(a, augmentation) - levels(b, augmentation)).abs().sum())
            pixels += a.numel()
    return total / pixels


def without_randomness(augmentation: Augmentation) -> Augmentation:
    """The recipe with the same steps, none of them random; the color jitter, which has no such form, left out."""
    blur = {"blur": 1.0, "blur_sigma": (1.0, 1.0)} if augmentation.blur_prob else {}
    return replace(augmentation, scale=(1.0, 1.0), flip_prob=1.0, jitter_prob=0.0, grayscale_prob=0.0, **blur)


def check_pixels(ours: Contender, other: Contender, setting: Setting, few: Any, side: int) -> Check:
    augmentation = replace(setting.augmentation, **other.recipe)
    what = "decoded pixels" if side == GRID else "views of equal seeds"
    if side != GRID and not other.same_params:
        augmentation, what = without_randomness(augmentation), "views with nothing random"
    setting = replace(setting, augmentation=augmentation, workers=0, shuffle=False)
    pair = [open_on(each, few, setting) for each in (other, ours)]
    check = Check(f"{what}, mean levels of 255", pixels_apart(*pair, augmentation), PIXELS_BOUND)
    for loader in pair:
        close(loader)
    return check


def compare(
    suite: Suite,
    contenders: Mapping[str, Contender],
    setting: Setting,
    data: Images,
    side: int,
    dtype: torch.dtype,
    headline: bool = True,
) -> None:
    """Open, time, check and record the contenders; the first is ours. side, dtype: see `Opened`."""
    opened: dict[str, Opened] = {}
    missing: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            opened[name] = Opened(contender, setting, data, side, dtype)
        except Exception as error:
            if not contender.requires:
                raise
            missing[name] = one_line(error)
    settle_heap()
    sizes = {"image_size": setting.augmentation.image_size, "views": 2, "batch_size": setting.batch_size}
    epochs = {name: each.epoch for name, each in opened.items()}
    suite.interleave(epochs, sizes=sizes | {"workers": WORKERS, "cores": CORES}, rounds=ROUNDS)
    ours, *names = opened
    others = {name: contenders[name] for name in names}
    suite.record(
        images={name: each.images for name, each in opened.items()},
        peak_mib={name: each.peak_mib for name, each in opened.items()},
        checks={
            name: check_pixels(contenders[ours], each, setting, data.few, side)
            for name, each in others.items()
            if not each.differs
        },
        missing=missing,
        notes={name: each.note for name, each in others.items() if each.note},
        ours=[name for name, each in others.items() if each.same_params and not each.tried],
        tried=[name for name, each in others.items() if each.tried],
        differing=[name for name, each in others.items() if each.differs],
        headline=headline,
        images_from=data.origin,
    )
    for each in opened.values():
        close(each.loader)
    opened.clear()
    epochs.clear()
    gc.collect()  # rivals' workers end with their loaders


# Ours


class OurViews:
    """`open_views`, its batches as pairs."""

    def __init__(self, data: Any, setting: Setting, backend: str) -> None:
        self._loader = open_views(
            str(data.folder) if isinstance(data, Photos) else data,
            setting.augmentation,
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

    def __init__(self, photos: Photos, setting: Setting, crop_backend: type[CropBackend]) -> None:
        source = open_source(str(photos.folder))
        self._sampler = Sampler(len(source), setting.batch_size, 0, 1, 0, setting.shuffle)
        if issubclass(crop_backend, DaliBackend):
            self._crop_backend: CropBackend = crop_backend(
                source, setting.augmentation, DEVICE, setting.batch_size, max(1, setting.workers)
            )
        else:
            self._crop_backend = TorchvisionBackend(source, setting.augmentation, DEVICE, setting.workers)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch = self._sampler.epoch
        requests = (BatchRequest(self._sampler.seed, epoch, index) for index in self._sampler.remaining())
        for made in self._crop_backend.crops(requests):
            yield tuple(view.permute(0, 3, 1, 2) for view in made.crops)
        self._sampler.epoch = epoch + 1

    def close(self) -> None:
        self._crop_backend.close()


def our_views(backend: str) -> Contender:
    return Contender(functools.partial(OurViews, backend=backend), same_params=True)


def our_crops(crop_backend: type[CropBackend], **more: Any) -> Contender:
    return Contender(functools.partial(OurCrops, crop_backend=crop_backend), same_params=True, **more)


# DALI as it is used elsewhere


class DaliReader:
    """DALI's own reader and decoder, and `count` results of `make` for each image, as tensors on the device."""

    def __init__(
        self, photos: Photos, setting: Setting, make: Callable[[Any, Augmentation, str], Any], count: int = 2
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
            return tuple(make(images, setting.augmentation, "gpu" if ON_GPU else "cpu") for _ in range(count))

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


def dali_grid(images: Any, augmentation: Augmentation, place: str) -> Any:
    return fn.resize(images, size=[GRID] * 2, interp_type=types.INTERP_NN, antialias=False, device=place)


def dali_crop(images: Any, augmentation: Augmentation, place: str) -> Any:
    return fn.random_resized_crop(
        images,
        size=[augmentation.image_size] * 2,
        random_aspect_ratio=list(augmentation.ratio),
        random_area=list(augmentation.scale),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        device=place,
    )


def dali_crop_and_flip(images: Any, augmentation: Augmentation, place: str) -> Any:
    flip = fn.random.coin_flip(probability=augmentation.flip_prob)
    return fn.flip(dali_crop(images, augmentation, place), horizontal=flip, device=place)


def dali_color_twist(images: Any, augmentation: Augmentation, place: str) -> Any:
    """The usual SimCLR graph: two crops, color_twist, blur, normalize.

    One matrix for the whole jitter, in a fixed order, with contrast about 128 and a hue turned in YIQ.
    """
    x = dali_crop(images, augmentation, place)
    jittered = fn.random.coin_flip(probability=augmentation.jitter_prob, dtype=types.BOOL)
    if jittered:
        x = fn.color_twist(
            x,
            brightness=fn.random.uniform(range=(1 - augmentation.brightness, 1 + augmentation.brightness)),
            contrast=fn.random.uniform(range=(1 - augmentation.contrast, 1 + augmentation.contrast)),
            saturation=fn.random.uniform(range=(1 - augmentation.saturation, 1 + augmentation.saturation)),
            hue=fn.random.uniform(range=(-360 * augmentation.hue, 360 * augmentation.hue)),
            device=place,
        )
    grey = fn.random.coin_flip(probability=augmentation.grayscale_prob, dtype=types.BOOL)
    if grey:
        x = fn.saturation(x, saturation=0.0, device=place)
    blurred = fn.random.coin_flip(probability=augmentation.blur_prob, dtype=types.BOOL)
    if blurred:
        x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=augmentation.blur_sigma), device=place)
    flip = fn.random.coin_flip(probability=augmentation.flip_prob)
    mean, std = ([255 * level for level in levels] for levels in (augmentation.mean, augmentation.std))
    return fn.crop_mirror_normalize(x, mirror=flip, mean=mean, std=std, output_layout="HWC", device=place)


def by_dali(make: Callable[[Any, Augmentation, str], Any], count: int = 2, **more: Any) -> Contender:
    return Contender(functools.partial(DaliReader, make=make, count=count), **more)
