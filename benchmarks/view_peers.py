"""Alternatives in bench_views.py: torchvision, lightly, Kornia and WebDataset, used as their documentation shows.

All of them use DataLoader workers. These are forked from a server with the necessary imports, because forking this
process would copy locks held by threads of torch or DALI. This module does not import DALI, so that the server does not
either. lightly, Kornia and WebDataset are imported where they are used, as they may not be installed.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_image
from torchvision.transforms import v2

from benchmarks.suite import CORES, DEVICE
from fastsimclr import Augmentation
from fastsimclr.data.images import decode

GRID = 8  # side of the grid of pixels that the decoding stage returns, as whole images differ in size
PRELOADED = ("benchmarks.view_peers", "torch.utils.data._utils.worker", "lightly.transforms")
PRELOADED += ("webdataset", "fastsimclr.data.torchvision")  # those not installed are ignored

Loader = Iterable[Sequence[Tensor]]
Transform = Callable[[Any], Sequence[Tensor]]


@dataclass(frozen=True)
class Photos:
    """The same photos as files of one folder and as tar shards, one per worker."""

    folder: Path
    files: tuple[str, ...]
    shards: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Setting:
    """Settings of a loader. workers: number of processes or threads; 0 loads in the calling thread."""

    augmentation: Augmentation
    batch_size: int
    workers: int
    shuffle: bool = True


@dataclass(frozen=True)
class Contender:
    """A loader to compare.

    open: opens the loader of photos (`Photos`) or of small images (an ArraySource). same_params: it samples the same
    random parameters from the same seed as fastsimclr's default loader. experiment: it is built on fastsimclr, but not
    part of the package. requires: the package that it needs. hardcoded: fields of the augmentation that it hardcodes;
    fastsimclr uses them too when both are compared. slow: it gets one copy of the images, the others several. inexact:
    it computes another function, so its views are not compared. note: remark for the report.
    """

    open: Callable[[Any, Setting], Loader]
    same_params: bool = False
    experiment: bool = False
    requires: str = ""
    hardcoded: dict[str, Any] = field(default_factory=dict)
    slow: bool = False
    inexact: bool = False
    note: str = ""


def start_server() -> None:
    """Start the server that workers are forked from, by forking a first process, which loads its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    first = context.Process(target=int)
    first.start()
    first.join()


def open_loader(dataset: Any, setting: Setting, **options: Any) -> Loader:
    """Open a DataLoader with persistent workers."""
    loader: Loader = DataLoader(
        dataset,
        num_workers=setting.workers,
        persistent_workers=setting.workers > 0,
        multiprocessing_context="forkserver" if setting.workers else None,
        **{"batch_size": setting.batch_size, "shuffle": setting.shuffle} | options,
    )
    return loader


class EachImage(Dataset[Any]):
    """Files, or arrays (H, W, 3) uint8, each read once and transformed into a sequence of tensors."""

    def __init__(self, images: tuple[Any, ...], read: Callable[[Any], Any], transform: Transform) -> None:
        self.images, self.read, self.transform = images, read, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sequence[Tensor]:
        return self.transform(self.read(self.images[index]))


def in_workers(
    read: Callable[[Any], Any], transform: Callable[[Augmentation], Transform]
) -> Callable[[Any, Setting], Loader]:
    """Return a function that opens a DataLoader whose workers read and transform each image."""

    def open_images(data: Any, setting: Setting) -> Loader:
        images = data.files if isinstance(data, Photos) else tuple(data.images.numpy())
        return open_loader(EachImage(images, read, transform(setting.augmentation)), setting)

    return open_images


def in_webdataset(transform: Callable[[Augmentation], Transform]) -> Callable[[Any, Setting], Loader]:
    """Return a function that opens WebDataset's reader of tar shards, one per worker, with its Pillow decoder."""

    def open_shards(photos: Photos, setting: Setting) -> Loader:
        import webdataset as wds

        dataset = wds.WebDataset(list(photos.shards), shardshuffle=len(photos.shards) if setting.shuffle else False)
        if setting.shuffle:
            dataset = dataset.shuffle(1000)  # the shuffle buffer of WebDataset's examples
        dataset = dataset.decode("pil").to_tuple("jpg").map_tuple(transform(setting.augmentation)).map(first_of)
        return open_loader(dataset.batched(setting.batch_size), setting, batch_size=None, shuffle=False)

    return open_shards


def first_of(sample: tuple[Any, ...]) -> Any:
    return sample[0]


# Reading and decoding


def open_pillow(image: Any) -> Image.Image:
    return Image.open(image).convert("RGB") if isinstance(image, str) else Image.fromarray(image)


def open_tensor(file: str) -> Tensor:
    return decode_image(file, "RGB")


def open_ours(file: str) -> Tensor:
    return decode(np.fromfile(file, dtype=np.uint8), file)


def pillow_grid(image: Image.Image) -> tuple[Tensor, ...]:
    """Return a grid of the image's pixels, (3, GRID, GRID)."""
    return (v2.functional.pil_to_tensor(image.resize((GRID, GRID), Image.Resampling.NEAREST)),)


def tensor_grid(image: Tensor) -> tuple[Tensor, ...]:
    """Return the pixel at the center of each cell, as nearest-neighbor resizing in Pillow and DALI does."""
    rows, columns = (((torch.arange(GRID) + 0.5) * (side / GRID)).long() for side in image.shape[1:])
    return (image[:, rows[:, None], columns],)


# torchvision and lightly


class TwoViews:
    """Two views of an image."""

    def __init__(self, steps: list[torch.nn.Module]) -> None:
        self.transform = v2.Compose(steps)

    def __call__(self, image: Any) -> tuple[Tensor, ...]:
        return self.transform(image), self.transform(image)


class PillowBlur(torch.nn.Module):
    """Pillow's Gaussian blur, approximated by three box filters."""

    def __init__(self, augmentation: Augmentation) -> None:
        super().__init__()
        self.p, self.sigma = augmentation.blur_prob, augmentation.blur_sigma

    def forward(self, image: Image.Image) -> Image.Image:
        if torch.rand(()) >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(*self.sigma))))


def window(augmentation: Augmentation) -> int:
    return max(3, int(augmentation.image_size * augmentation.blur_kernel) // 2 * 2 + 1)


def crop_and_flip(augmentation: Augmentation) -> list[torch.nn.Module]:
    filter_ = v2.InterpolationMode(augmentation.interpolation)
    return [
        v2.RandomResizedCrop(
            augmentation.image_size, augmentation.scale, augmentation.ratio, interpolation=filter_, antialias=True
        ),
        v2.RandomHorizontalFlip(augmentation.flip_prob),
    ]


def augment(augmentation: Augmentation, blur: torch.nn.Module, *conversion: torch.nn.Module) -> TwoViews:
    jitter = v2.ColorJitter(augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
    colors = [v2.RandomApply([jitter], augmentation.jitter_prob), v2.RandomGrayscale(augmentation.grayscale_prob)]
    finish = [
        *conversion,
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(augmentation.mean), list(augmentation.std)),
    ]
    return TwoViews([*crop_and_flip(augmentation), *colors, *([blur] if augmentation.blur_prob else []), *finish])


def views_on_pillow(augmentation: Augmentation) -> TwoViews:
    """torchvision's v2 transforms on Pillow images, in the order of lightly's SimCLRTransform."""
    return augment(augmentation, PillowBlur(augmentation), v2.PILToTensor())


def views_on_tensors(augmentation: Augmentation) -> TwoViews:
    """torchvision's v2 transforms on uint8 tensors, with its GaussianBlur."""
    return augment(
        augmentation,
        v2.RandomApply([v2.GaussianBlur(window(augmentation), augmentation.blur_sigma)], augmentation.blur_prob),
    )


def crops_on_pillow(augmentation: Augmentation) -> TwoViews:
    return TwoViews([*crop_and_flip(augmentation), v2.PILToTensor()])


def crops_on_tensors(augmentation: Augmentation) -> TwoViews:
    return TwoViews(crop_and_flip(augmentation))


def lightly_transform(augmentation: Augmentation) -> Any:
    """lightly's SimCLRTransform with the options of `augmentation`. Raises ImportError if lightly is not installed."""
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(
        input_size=augmentation.image_size,
        cj_prob=augmentation.jitter_prob,
        cj_strength=1.0,
        cj_bright=augmentation.brightness,
        cj_contrast=augmentation.contrast,
        cj_sat=augmentation.saturation,
        cj_hue=augmentation.hue,
        min_scale=augmentation.scale[0],
        random_gray_scale=augmentation.grayscale_prob,
        gaussian_blur=augmentation.blur_prob,
        sigmas=augmentation.blur_sigma,
        hf_prob=augmentation.flip_prob,
        normalize={"mean": list(augmentation.mean), "std": list(augmentation.std)},
    )


# Batches of tensors


def batches_of(count: int, setting: Setting) -> Iterator[Tensor]:
    """Yield the indices of each batch of `count` images."""
    order = torch.randperm(count) if setting.shuffle else torch.arange(count)
    yield from order.split(setting.batch_size)


class Kornia:
    """Kornia's augmentations of whole batches on the device, in this process, with one thread per core.

    Photos differ in size, so they form a batch only after cropping: workers decode and crop them with torchvision, and
    Kornia applies the color operations. Small images form a batch from the start, and Kornia does everything.
    """

    def __init__(self, data: Any, setting: Setting) -> None:
        import kornia.augmentation as K

        augmentation = setting.augmentation
        self._setting = setting
        self._crops: Loader = ()
        self._images: Tensor | None = None
        steps: list[Any] = []
        if isinstance(data, Photos):
            self._crops = in_workers(open_tensor, crops_on_tensors)(data, setting)
        else:
            self._images = data.images.permute(0, 3, 1, 2).contiguous()  # (N, 3, h, w) uint8
            size, filter_ = (augmentation.image_size,) * 2, augmentation.interpolation.upper()
            crop = K.RandomResizedCrop(size, augmentation.scale, augmentation.ratio, resample=filter_)
            steps = [crop, K.RandomHorizontalFlip(p=augmentation.flip_prob)]
        steps.append(
            K.ColorJitter(
                augmentation.brightness,
                augmentation.contrast,
                augmentation.saturation,
                augmentation.hue,
                p=augmentation.jitter_prob,
            )
        )
        steps.append(K.RandomGrayscale(p=augmentation.grayscale_prob))
        if augmentation.blur_prob:
            steps.append(
                K.RandomGaussianBlur((window(augmentation),) * 2, augmentation.blur_sigma, p=augmentation.blur_prob)
            )
        steps.append(K.Normalize(torch.tensor(augmentation.mean), torch.tensor(augmentation.std)))
        self._augment = K.AugmentationSequential(*steps, data_keys=["input"])

    def _batches(self) -> Iterator[Sequence[Tensor]]:
        if self._images is None:
            yield from self._crops
            return
        for index in batches_of(len(self._images), self._setting):
            yield (self._images[index],) * 2

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        before = torch.get_num_threads()
        torch.set_num_threads(CORES)
        try:
            for batch in self._batches():
                yield tuple(self._augment(view.to(DEVICE).float() / 255) for view in batch)
        finally:
            torch.set_num_threads(before)
