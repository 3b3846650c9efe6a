"""What makes two augmented views of each image elsewhere: torchvision's transforms in a DataLoader, and a DALI graph.

Each is an iterable over epochs of batches, as a user would write it: `for first, second in loader`.
"""

from collections.abc import Callable, Iterator

import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_image
from torchvision.transforms import v2

from fastsimclr import Views

Transform = Callable[[object], Tensor]


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Files, or arrays, each opened once and transformed twice."""

    def __init__(self, images: list[object], read: Callable[[object], object], transform: Transform) -> None:
        self.images, self.read, self.transform = images, read, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.read(self.images[index])
        return self.transform(image), self.transform(image)


def window(views: Views) -> int:
    return max(3, int(views.image_size * views.blur_kernel) // 2 * 2 + 1)


def crop_and_jitter(views: Views) -> list[torch.nn.Module]:
    jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    return [
        v2.RandomResizedCrop(views.image_size, views.scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(views.flip),
        v2.RandomApply([jitter], views.jitter),
        v2.RandomGrayscale(views.grey),
    ]


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


def open_pillow(image: object) -> Image.Image:
    return Image.open(image).convert("RGB") if isinstance(image, str) else Image.fromarray(image)  # type: ignore[arg-type]


def open_tensor(image: object) -> Tensor:
    return decode_image(image, "RGB")  # type: ignore[arg-type]


def torchvision_pillow(views: Views) -> tuple[Callable[[object], object], Transform]:
    """The fastest recipe of torchvision's with the same semantics: all on Pillow's images."""
    each = [*crop_and_jitter(views), *([PillowBlur(views)] if views.blur else []), v2.PILToTensor(), *finish(views)]
    return open_pillow, v2.Compose(each)


def torchvision_tensor(views: Views) -> tuple[Callable[[object], object], Transform]:
    """torchvision's v2 transforms on uint8 tensors, with its GaussianBlur."""
    blur = v2.RandomApply([v2.GaussianBlur(window(views), views.blur_sigma)], views.blur)
    return open_tensor, v2.Compose([*crop_and_jitter(views), *([blur] if views.blur else []), *finish(views)])


def torchvision_loader(
    recipe: tuple[Callable[[object], object], Transform], images: list[object], batch_size: int, workers: int
) -> "DataLoader[tuple[Tensor, Tensor]]":
    return DataLoader(
        TwoViews(images, *recipe),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="forkserver" if workers else None,
    )


class DaliColorTwist:
    """DALI's own reader and operators, the usual SimCLR graph: one decode, two crops, color_twist, blur, normalise."""

    def __init__(self, files: list[str], views: Views, batch_size: int, threads: int, device: str) -> None:
        on_gpu = device == "cuda"
        place = "gpu" if on_gpu else "cpu"
        levels = [255 * x for x in views.mean], [255 * x for x in views.std]

        def view(images: object) -> object:
            x = fn.random_resized_crop(
                images,
                size=[views.image_size] * 2,
                random_aspect_ratio=list(views.ratio),
                random_area=list(views.scale),
                interp_type=types.INTERP_CUBIC,
                antialias=True,
                device=place,
            )
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

        @pipeline_def(
            batch_size=batch_size, num_threads=threads, device_id=0 if on_gpu else None, enable_conditionals=True
        )
        def graph() -> tuple[object, ...]:
            data, _ = fn.readers.file(files=files, random_shuffle=True, pad_last_batch=True, name="files")
            images = fn.decoders.image(data, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
            return view(images), view(images)

        self._iterator = DALIGenericIterator(
            graph(),
            ["first", "second"],
            reader_name="files",
            last_batch_policy=LastBatchPolicy.PARTIAL,
            auto_reset=True,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (batch,) in self._iterator:
            yield batch["first"].permute(0, 3, 1, 2), batch["second"].permute(0, 3, 1, 2)
