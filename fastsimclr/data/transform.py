"""Preparation of a single image for an encoder, the same as in evaluation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fastsimclr.data.augmentation import Augmentation


@dataclass(frozen=True)
class Transform:
    """The central square of an image, resized and normalized.

    Call it with a PIL image or a (3, H, W) uint8 tensor; it returns a (3, image_size, image_size) float32 tensor.
    """

    image_size: int
    center_fraction: float
    """Side of the central square, as a fraction of the image's shorter side."""
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @staticmethod
    def from_augmentation(augmentation: Augmentation) -> "Transform":
        """The preparation that evaluation, kNN and `embed` use after training with `augmentation`."""
        a = augmentation
        return Transform(a.image_size, a.center_fraction, a.interpolation, a.mean, a.std)

    def __call__(self, image: Any) -> Tensor:
        if not isinstance(image, Tensor):
            image = F.pil_to_tensor(image.convert("RGB"))
        height, width = image.shape[-2:]
        side = max(1, round(self.center_fraction * min(height, width)))
        image = F.crop(image, (height - side) // 2, (width - side) // 2, side, side)
        interpolation = F.InterpolationMode(self.interpolation)
        image = F.resize(image, [self.image_size] * 2, interpolation, antialias=True)
        return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(self.mean), list(self.std))

    def code(self) -> str:
        """The same as Python code without fastsimclr, for an image (3, H, W) uint8."""
        return f"""\
import torch
from torchvision.transforms.v2 import functional as F

height, width = image.shape[-2:]
side = max(1, round({self.center_fraction} * min(height, width)))
image = F.crop(image, (height - side) // 2, (width - side) // 2, side, side)
image = F.resize(image, [{self.image_size}] * 2, F.InterpolationMode("{self.interpolation}"), antialias=True)
image = F.to_dtype(image, torch.float32, scale=True)
image = F.normalize(image, {list(self.mean)}, {list(self.std)})"""
