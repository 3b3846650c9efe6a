"""fastsimclr's loaders in bench_views.py, DALI's own pipelines, and the comparison of all loaders.

All loaders are opened on the same images, timed in turn, and checked to return the same views. fastsimclr's loaders are
compared on the whole augmentation, as they sample the same random parameters from the same seed. The alternatives
sample their own: they are compared without random operations, which leaves reading, decoding, resizing, flipping,
blurring and normalizing.
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

from benchmarks.memory import settle_heap, tree_peak_mib, trimmed_mib
from benchmarks.suite import CORES, DEVICE, ON_GPU, SMALL, Check, Suite, error_line
from benchmarks.view_peers import GRID, Contender, Loader, Photos, Setting, batches_of
from fastsimclr import Augmentation
from fastsimclr.data import open_source, open_views
from fastsimclr.data.dali import DaliBackend
from fastsimclr.data.loader import BatchRequest, CropBackend
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.sources import ArraySource
from fastsimclr.data.torchvision import TorchvisionBackend

PIXELS_BOUND = 1.5  # as between two of fastsimclr's loaders in tests/data/test_loaders.py
PIXEL_DIFFERENCE = "mean pixel difference (scale 0 to 255)"
ROUNDS = 2 if SMALL else 5
WORKERS = min(16, CORES)


@dataclass(frozen=True)
class Images:
    """The images of an epoch, those of a slow contender's epoch, and those, 4:3, whose pixels are compared."""

    whole: Any
    once: Any
    compared: Any
    origin: str


class OpenLoader:
    """A contender's loader, after one epoch. side, dtype: expected side and dtype of each view."""

    def __init__(self, contender: Contender, setting: Setting, data: Images, side: int, dtype: torch.dtype) -> None:
        if contender.requires:
            importlib.import_module(contender.requires)  # so that its imports are not part of its memory
        images = data.once if contender.slow else data.whole
        before = trimmed_mib()
        self.side, self.dtype, self.images = side, dtype, len(images)
        self.loader = open_loader_on(contender, images, setting)
        self.peak_mib = tree_peak_mib(self.epoch) - before

    def epoch(self) -> None:
        seen = 0
        for batch in self.loader:
            for view in batch:
                assert view.shape[1:] == (3, self.side, self.side)
                assert view.dtype == self.dtype
                view.to(DEVICE, non_blocking=True)
            seen += len(batch[0])
        assert seen == self.images


def open_loader_on(contender: Contender, images: Any, setting: Setting) -> Loader:
    return contender.open(images, replace(setting, batch_size=min(setting.batch_size, len(images))))


def close(loader: Loader) -> None:
    getattr(loader, "close", lambda: None)()


def levels(view: Tensor, augmentation: Augmentation) -> Tensor:
    """Return the pixels of a uint8 or normalized view on the scale 0 to 255, float32 on the CPU."""
    view = view.detach().cpu()
    if view.dtype == torch.uint8:
        return view.float()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (augmentation.mean, augmentation.std))
    return (view.float() * std + mean) * 255


def pixel_difference(a_loader: Loader, b_loader: Loader, augmentation: Augmentation) -> float:
    """Return the mean pixel difference between the views of two unshuffled loaders of equal length."""
    total, pixels = 0.0, 0
    for a_batch, b_batch in itertools.zip_longest(a_loader, b_loader, fillvalue=()):
        for a, b in zip(a_batch, b_batch, strict=True):
            total += float((levels(a, augmentation) - levels(b, augmentation)).abs().sum())
            pixels += a.numel()
    return total / pixels


def without_randomness(augmentation: Augmentation) -> Augmentation:
    """Return the augmentation without randomness; color jitter, which has no such form, is left out."""
    blur = {"blur_prob": 1.0, "blur_sigma": (1.0, 1.0)} if augmentation.blur_prob else {}
    return replace(augmentation, scale=(1.0, 1.0), flip_prob=1.0, jitter_prob=0.0, grayscale_prob=0.0, **blur)


def check_pixels(ours: Contender, other: Contender, setting: Setting, compared: Any, side: int) -> Check:
    augmentation = replace(setting.augmentation, **other.hardcoded)
    what = "decoded images" if side == GRID else "same random parameters"
    if side != GRID and not other.same_params:
        augmentation, what = without_randomness(augmentation), "no random operations"
    setting = replace(setting, augmentation=augmentation, workers=0, shuffle=False)
    pair = [open_loader_on(each, compared, setting) for each in (other, ours)]
    check = Check(f"{PIXEL_DIFFERENCE}, {what}", pixel_difference(*pair, augmentation), PIXELS_BOUND)
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
    *,
    readme_task: str = "",
) -> None:
    """Open, time, check and record the contenders, fastsimclr first. side, dtype: see `OpenLoader`."""
    opened: dict[str, OpenLoader] = {}
    missing: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            opened[name] = OpenLoader(contender, setting, data, side, dtype)
        except Exception as error:
            if not contender.requires:
                raise
            missing[name] = error_line(error)
    settle_heap()
    sizes = {"image_size": setting.augmentation.image_size, "views": 2, "batch_size": setting.batch_size}
    epochs = {name: each.epoch for name, each in opened.items()}
    suite.interleave(epochs, sizes=sizes | {"workers": WORKERS, "cores": CORES}, rounds=ROUNDS)
    first, *names = opened
    others = {name: contenders[name] for name in names}
    suite.record(
        images={name: each.images for name, each in opened.items()},
        peak_mib={name: each.peak_mib for name, each in opened.items()},
        checks={
            name: check_pixels(contenders[first], each, setting, data.compared, side)
            for name, each in others.items()
            if not each.inexact
        },
        missing=missing,
        notes={name: each.note for name, each in others.items() if each.note},
        variants=[name for name, each in others.items() if each.same_params and not each.experiment],
        experiments=[name for name, each in others.items() if each.experiment],
        inexact=[name for name, each in others.items() if each.inexact],
        readme_task=readme_task,
        images_from=data.origin,
    )
    for each in opened.values():
        close(each.loader)
    opened.clear()
    epochs.clear()
    gc.collect()  # ends the workers of loaders without close()


# fastsimclr


class OurViews:
    """`open_views`, returning pairs of views."""

    def __init__(self, data: Any, setting: Setting, backend: str, pixels: PixelOptions | None = None) -> None:
        self._loader = open_views(
            str(data.folder) if isinstance(data, Photos) else data,
            setting.augmentation,
            setting.batch_size,
            pixels=pixels,
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


class OurModule:
    """`Augmentation.as_module` on the batches (B, 3, h, w) uint8 that Kornia also gets."""

    def __init__(self, images: ArraySource, setting: Setting) -> None:
        self._images, self._setting = images.images.permute(0, 3, 1, 2).contiguous(), setting
        self._module = setting.augmentation.as_module()

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for index in batches_of(len(self._images), self._setting):
            yield self._module(self._images[index].to(DEVICE))


class OurCrops:
    """The first half of fastsimclr's loaders: read, decode, crop, resize, flip; with `DaliColors`, also the colors."""

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
        requests = (BatchRequest(self._sampler.seed, epoch, batch.index) for batch in self._sampler.remaining())
        for batch in self._crop_backend.crops(requests):
            yield tuple(view.permute(0, 3, 1, 2) for view in batch.crops)
        self._sampler.epoch = epoch + 1

    def close(self) -> None:
        self._crop_backend.close()


def our_views(backend: str, pixels: PixelOptions | None = None) -> Contender:
    return Contender(functools.partial(OurViews, backend=backend, pixels=pixels), same_params=True)


def our_module() -> Contender:
    return Contender(OurModule, same_params=True)


def our_crops(crop_backend: type[CropBackend], **more: Any) -> Contender:
    return Contender(functools.partial(OurCrops, crop_backend=crop_backend), same_params=True, **more)


# DALI's own pipelines


class DaliReader:
    """DALI's reader and decoder, and `count` results of `make` for each image, as tensors on the device."""

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


def dali_grid(images: Any, augmentation: Augmentation, device: str) -> Any:
    return fn.resize(images, size=[GRID] * 2, interp_type=types.INTERP_NN, antialias=False, device=device)


def dali_crop(images: Any, augmentation: Augmentation, device: str) -> Any:
    return fn.random_resized_crop(
        images,
        size=[augmentation.image_size] * 2,
        random_aspect_ratio=list(augmentation.ratio),
        random_area=list(augmentation.scale),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        device=device,
    )


def dali_crop_and_flip(images: Any, augmentation: Augmentation, device: str) -> Any:
    flip = fn.random.coin_flip(probability=augmentation.flip_prob)
    return fn.flip(dali_crop(images, augmentation, device), horizontal=flip, device=device)


def dali_color_twist(images: Any, augmentation: Augmentation, device: str) -> Any:
    """The usual SimCLR graph: two crops, color_twist, blur, normalize.

    color_twist applies the whole color jitter as one matrix, in a fixed order, with contrast about 128 and the hue
    shifted in YIQ.
    """
    x = dali_crop(images, augmentation, device)
    jittered = fn.random.coin_flip(probability=augmentation.jitter_prob, dtype=types.BOOL)
    if jittered:
        x = fn.color_twist(
            x,
            brightness=fn.random.uniform(range=(1 - augmentation.brightness, 1 + augmentation.brightness)),
            contrast=fn.random.uniform(range=(1 - augmentation.contrast, 1 + augmentation.contrast)),
            saturation=fn.random.uniform(range=(1 - augmentation.saturation, 1 + augmentation.saturation)),
            hue=fn.random.uniform(range=(-360 * augmentation.hue, 360 * augmentation.hue)),
            device=device,
        )
    grayscale = fn.random.coin_flip(probability=augmentation.grayscale_prob, dtype=types.BOOL)
    if grayscale:
        x = fn.saturation(x, saturation=0.0, device=device)
    blurred = fn.random.coin_flip(probability=augmentation.blur_prob, dtype=types.BOOL)
    if blurred:
        x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=augmentation.blur_sigma), device=device)
    flip = fn.random.coin_flip(probability=augmentation.flip_prob)
    mean, std = ([255 * level for level in levels] for levels in (augmentation.mean, augmentation.std))
    return fn.crop_mirror_normalize(x, mirror=flip, mean=mean, std=std, output_layout="HWC", device=device)


def by_dali(make: Callable[[Any, Augmentation, str], Any], count: int = 2, **more: Any) -> Contender:
    return Contender(functools.partial(DaliReader, make=make, count=count), **more)
