"""Who else makes two augmented views in bench_views.py: torchvision, lightly, Kornia and WebDataset, as their users do.

All of them work in a DataLoader's processes. These are forked from a server that has imported what they need, because
to fork this process would copy locks that threads of torch or DALI hold; they start as fast as forked ones, and share
the packages' memory as those do. No DALI is imported here, so none is in that server.

lightly, Kornia and WebDataset are imported where they are used: they may not be there.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_image
from torchvision.transforms import v2

from fastsimclr import Views
from fastsimclr.data.images import decode

if TYPE_CHECKING:
    from benchmarks.view_contenders import Loader, Photos, Setting

GRID = 8  # pixels a side that the decoding stage hands on: view_contenders.GRID
Images = tuple[Any, ...]  # names of files, or arrays (H, W, 3) uint8
PRELOADED = ("benchmarks.view_peers", "torch.utils.data._utils.worker", "lightly.transforms", "lightly.data")
PRELOADED += ("webdataset", "fastsimclr.data.torchvision")  # what is not there is passed over


def start_server() -> None:
    """Start the server that workers are forked from, with its imports, by letting it fork one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    first = context.Process(target=int)
    first.start()
    first.join()


class Each(Dataset[Any]):
    """Files, or arrays, each opened once and made into a tuple of tensors."""

    def __init__(self, images: Images, read: Callable[[Any], Any], make: Callable[[Any], tuple[Tensor, ...]]) -> None:
        self.images, self.read, self.make = images, read, make

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.make(self.read(self.images[index]))


class Twice:
    """Two views of an image."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> tuple[Tensor, ...]:
        return self.transform(image), self.transform(image)


def loader(dataset: Any, setting: "Setting", **options: Any) -> Any:
    """A DataLoader as their examples open it, with workers that stay from epoch to epoch."""
    return DataLoader(
        dataset,
        num_workers=setting.workers,
        persistent_workers=setting.workers > 0,
        multiprocessing_context="forkserver" if setting.workers else None,
        **{"batch_size": setting.batch_size, "shuffle": setting.shuffle} | options,
    )


# Reading and decoding


def open_pillow(image: Any) -> Image.Image:
    if isinstance(image, str):
        return Image.open(image).convert("RGB")
    return Image.fromarray(image)


def open_tensor(image: Any) -> Tensor:
    return decode_image(image, "RGB")


def open_ours(file: str) -> Tensor:
    return decode(np.fromfile(file, dtype=np.uint8), file)


def grid_of_pillow(image: Image.Image) -> tuple[Tensor, ...]:
    """(3, GRID, GRID) of the decoded image's pixels."""
    return (v2.functional.pil_to_tensor(image.resize((GRID, GRID), Image.Resampling.NEAREST)),)


def grid_of_tensor(image: Tensor) -> tuple[Tensor, ...]:
    """The same pixels as Pillow's and DALI's nearest neighbours: those at the middle of each cell."""
    rows, columns = (((torch.arange(GRID) + 0.5) * (side / GRID)).long() for side in image.shape[1:])
    return (image[:, rows[:, None], columns],)


def our_decode(photos: "Photos", setting: "Setting") -> "Loader":
    return loader(Each(photos.files, open_ours, grid_of_tensor), setting)


def pillow_decode(photos: "Photos", setting: "Setting") -> "Loader":
    return loader(Each(photos.files, open_pillow, grid_of_pillow), setting)


def torchvision_decode(photos: "Photos", setting: "Setting") -> "Loader":
    return loader(Each(photos.files, open_tensor, grid_of_tensor), setting)


# torchvision


def window(views: Views) -> int:
    return max(3, int(views.image_size * views.blur_kernel) // 2 * 2 + 1)


def crop_and_flip(views: Views) -> list[torch.nn.Module]:
    filter_ = v2.InterpolationMode(views.interpolation)
    return [
        v2.RandomResizedCrop(views.image_size, views.scale, views.ratio, interpolation=filter_, antialias=True),
        v2.RandomHorizontalFlip(views.flip),
    ]


def jitter_and_grey(views: Views) -> list[torch.nn.Module]:
    jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    return [v2.RandomApply([jitter], views.jitter), v2.RandomGrayscale(views.grey)]


class PillowBlur(torch.nn.Module):
    """Pillow's Gaussian blur (three box filters), the usual shortcut of fast recipes."""

    def __init__(self, views: Views) -> None:
        super().__init__()
        self.p, self.sigma = views.blur, views.blur_sigma

    def forward(self, image: Image.Image) -> Image.Image:
        if torch.rand(()) >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(*self.sigma))))


def finish(views: Views) -> list[torch.nn.Module]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(views.mean), list(views.std))]


def recipe_on_pillow(views: Views) -> Twice:
    """The fastest recipe of torchvision's with the same semantics, lightly's list: all on Pillow's images."""
    blur = [PillowBlur(views)] if views.blur else []
    return Twice(v2.Compose([*crop_and_flip(views), *jitter_and_grey(views), *blur, v2.PILToTensor(), *finish(views)]))


def crops_on_pillow(views: Views) -> Twice:
    return Twice(v2.Compose([*crop_and_flip(views), v2.PILToTensor()]))


def crops_on_tensors(views: Views) -> Twice:
    return Twice(v2.Compose(crop_and_flip(views)))


def images_of(data: Any) -> Images:
    """The files of photographs; or small images as they are."""
    return data.files if hasattr(data, "files") else tuple(data.images.numpy())


def pillow_crops(photos: "Photos", setting: "Setting") -> "Loader":
    return loader(Each(photos.files, open_pillow, crops_on_pillow(setting.views)), setting)


def pillow_views(data: Any, setting: "Setting") -> "Loader":
    return loader(Each(images_of(data), open_pillow, recipe_on_pillow(setting.views)), setting)


def tensor_crops(photos: "Photos", setting: "Setting") -> "Loader":
    return loader(Each(photos.files, open_tensor, crops_on_tensors(setting.views)), setting)


def tensor_views(photos: "Photos", setting: "Setting") -> "Loader":
    """torchvision's v2 transforms on uint8 tensors, with its GaussianBlur."""
    views = setting.views
    blur = v2.RandomApply([v2.GaussianBlur(window(views), views.blur_sigma)], views.blur)
    recipe = Twice(v2.Compose([*crop_and_flip(views), *jitter_and_grey(views), blur, *finish(views)]))
    return loader(Each(photos.files, open_tensor, recipe), setting)


# lightly


def lightly_transform(views: Views) -> Any:
    """lightly's SimCLRTransform, set to our recipe. Raises ImportError where lightly is not installed."""
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(
        input_size=views.image_size,
        cj_prob=views.jitter,
        cj_strength=1.0,
        cj_bright=views.brightness,
        cj_contrast=views.contrast,
        cj_sat=views.saturation,
        cj_hue=views.hue,
        min_scale=views.scale[0],
        random_gray_scale=views.grey,
        gaussian_blur=views.blur,
        sigmas=views.blur_sigma,
        hf_prob=views.flip,
        normalize={"mean": list(views.mean), "std": list(views.std)},
    )


class Lightly:
    """lightly's SimCLRTransform in its dataset and a DataLoader, as in its SimCLR example."""

    def __init__(self, data: Any, setting: "Setting") -> None:
        from lightly.data import LightlyDataset

        transform = lightly_transform(setting.views)
        if hasattr(data, "folder"):
            dataset = LightlyDataset(str(data.folder), transform)
        else:
            dataset = LightlyDataset.from_torch_dataset(Labelled(images_of(data)), transform)
        self._loader = loader(dataset, setting)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for views, _, _ in self._loader:
            yield tuple(views)


class Labelled(Dataset[Any]):
    """Small images as torchvision's CIFAR10 gives them."""

    transform: Any = None

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), 0


# Kornia


class Kornia:
    """Kornia's augmentations of whole batches, on the loader's device: in this process, with all cores' threads.

    Photographs are of many sizes and no batch before they are cropped: workers decode and crop them by torchvision, and
    Kornia changes the colours. Small images are a batch from the start, and Kornia does everything.
    """

    def __init__(self, data: Any, setting: "Setting") -> None:
        import kornia.augmentation as K

        views = setting.views
        size = (views.image_size, views.image_size)
        self._setting = setting
        self._images: Tensor | None = None
        first: list[Any] = []
        if hasattr(data, "files"):
            self._crops = tensor_crops(data, setting)
        else:
            self._images = data.images.permute(0, 3, 1, 2).contiguous()  # (N, 3, h, w) uint8
            filter_ = views.interpolation.upper()
            first = [
                K.RandomResizedCrop(size, views.scale, views.ratio, resample=filter_),
                K.RandomHorizontalFlip(p=views.flip),
            ]
        blur = [K.RandomGaussianBlur((window(views),) * 2, views.blur_sigma, p=views.blur)] if views.blur else []
        self._augment = K.AugmentationSequential(
            *first,
            K.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue, p=views.jitter),
            K.RandomGrayscale(p=views.grey),
            *blur,
            K.Normalize(torch.tensor(views.mean), torch.tensor(views.std)),
            data_keys=["input"],
        )

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        if self._images is None:
            yield from self._crops
            return
        number = len(self._images)
        order = torch.randperm(number) if self._setting.shuffle else torch.arange(number)
        for chosen in order.split(self._setting.batch_size):
            batch = self._images[chosen]
            yield batch, batch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._setting.cores)
        try:
            with torch.no_grad():
                for batch in self._batches():
                    yield tuple(self._augment(view.to(self._setting.device).float() / 255) for view in batch)
        finally:
            torch.set_num_threads(before)


# WebDataset


class WebDatasets:
    """WebDataset's reader of tar shards, one a worker, and its Pillow decoder; `make` sees the decoded image."""

    def __init__(self, photos: "Photos", setting: "Setting", make: Callable[[Image.Image], tuple[Tensor, ...]]) -> None:
        import webdataset as wds

        dataset = wds.WebDataset(list(photos.shards), shardshuffle=len(photos.shards) if setting.shuffle else False)
        if setting.shuffle:
            dataset = dataset.shuffle(1000)  # the samples that its examples keep to draw from
        dataset = dataset.decode("pil").to_tuple("jpg").map_tuple(make).map(first_of).batched(setting.batch_size)
        self._loader = loader(dataset, setting, batch_size=None, shuffle=False)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._loader:
            yield tuple(batch)


def first_of(sample: tuple[Any, ...]) -> Any:
    return sample[0]


def webdataset_decode(photos: "Photos", setting: "Setting") -> "Loader":
    return WebDatasets(photos, setting, grid_of_pillow)


def webdataset_crops(photos: "Photos", setting: "Setting") -> "Loader":
    return WebDatasets(photos, setting, crops_on_pillow(setting.views))


def webdataset_views(photos: "Photos", setting: "Setting") -> "Loader":
    return WebDatasets(photos, setting, recipe_on_pillow(setting.views))
