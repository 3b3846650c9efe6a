"""Preparation of a single image for an encoder, the same as in evaluation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.pixels import RGB8, PixelFormat


@dataclass(frozen=True)
class Transform:
    """The central square of an image, resized and normalized.

    Call it with a PIL image or a tensor (C, H, W), of the format `pixels`; it returns a float32 tensor
    (C, image_size, image_size). A PIL image is converted to RGB, so it can be given only for 8-bit RGB.
    """

    image_size: int
    center_fraction: float
    """Side of the central square, as a fraction of the image's shorter side."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: PixelFormat = RGB8

    @staticmethod
    def from_augmentation(augmentation: Augmentation, pixels: PixelFormat = RGB8) -> "Transform":
        """The preparation that evaluation, kNN and `embed` use after training with `augmentation`."""
        a = augmentation
        return Transform(a.image_size, a.center_fraction, a.interpolation, *a.statistics, pixels)

    def __call__(self, image: Any) -> Tensor:
        if not isinstance(image, Tensor):
            if self.pixels != RGB8:
                raise ValueError(f"image: got {type(image).__name__}, expected a tensor (C, H, W) of {self.pixels}")
            image = F.pil_to_tensor(image.convert("RGB"))
        height, width = image.shape[-2:]
        side = max(1, round(self.center_fraction * min(height, width)))
        image = F.crop(image, (height - side) // 2, (width - side) // 2, side, side)
        interpolation = F.InterpolationMode(self.interpolation)
        if self.pixels != RGB8:
            image = image.to(torch.float32)
        image = F.resize(image, [self.image_size] * 2, interpolation, antialias=True)
        if self.pixels == RGB8:
            image = F.to_dtype(image, torch.float32, scale=True)
        else:
            image = self.pixels.to_unit(image)
        return F.normalize(image, list(self.mean), list(self.std))

    def code(self) -> str:
        """The same as Python code without fastsimclr, for a tensor (C, H, W) of the format `pixels`."""
        low, high = self.pixels.value_range
        is_rgb8 = self.pixels == RGB8
        convert = "" if is_rgb8 else "image = image.to(torch.float32)\n"
        scaled = "F.to_dtype(image, torch.float32, scale=True)"
        if not is_rgb8:
            scaled = f"((image - {low}) / {high - low}).clamp(0, 1)"
        return f"""\
import torch
from torchvision.transforms.v2 import functional as F

height, width = image.shape[-2:]
side = max(1, round({self.center_fraction} * min(height, width)))
image = F.crop(image, (height - side) // 2, (width - side) // 2, side, side)
{convert}image = F.resize(image, [{self.image_size}] * 2, F.InterpolationMode("{self.interpolation}"), antialias=True)
image = {scaled}
image = F.normalize(image, {list(self.mean)}, {list(self.std)})"""
