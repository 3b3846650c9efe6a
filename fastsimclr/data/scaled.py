"""Decoding of JPEGs that are much larger than their views at a fraction of their size.

libjpeg decodes at 1/2, 1/4 or 1/8 of the size by a smaller inverse DCT of each block of 8x8 pixels. The factor is the
largest that leaves every crop at least as large as its view. The random parameters are sampled for the full size, so
they are those of a full decode, and the boxes are divided by the factor without rounding.

Views of 224x224 from noisy photographs of 4000x3000 differ from those of a full decode by 0.8 levels of 255 on average,
at most 2.1 in one view (benchmarks/NOTES.md). Images of less than MIN_PIXELS are always decoded in full. What remains
of the time is mostly the Huffman code, which no scale shortens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.headers import Header, open_by_pillow
from fastsimclr.data.params import ViewParams
from fastsimclr.data.raw import upright
from fastsimclr.data.sources import EncodedSource

MIN_PIXELS = 2_000_000
_FACTORS = (8, 4, 2)
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ROWS_REVERSED, _COLUMNS_REVERSED = (3, 4, 7, 8), (2, 3, 6, 7)  # orientations whose upright image counts from the end


@dataclass(frozen=True)
class ScaledImage:
    """An image decoded at a fraction of its size."""

    image: Tensor
    """(3, h, w) uint8, upright."""
    boxes: NDArray[np.float64]
    """(V, 4): top, left, height and width of each view's crop, in its pixels."""


def may_be_scaled(source: EncodedSource, header: Header) -> bool:
    """Return whether the source's images with this header are decoded at a fraction of their size if crops allow."""
    return source.scaled_decode == "auto" and header.format == "JPEG" and header.height * header.width >= MIN_PIXELS


def decode_scaled(
    data: NDArray[np.uint8], header: Header, augmentation: Augmentation, params: Sequence[ViewParams]
) -> ScaledImage | None:
    """Decode a JPEG at the smallest size at which each crop is at least as large as its view.

    params: one array (1,) per view, sampled for the full size. Returns None if the image is to be decoded in full: the
    crops need that, or the file cannot be decoded otherwise.
    """
    views = zip(params, augmentation.recipes, strict=True)
    pixels_per_pixel = min(each["box"][0, 2:].min() / recipe.image_size for each, recipe in views)
    factor = next((factor for factor in _FACTORS if factor <= pixels_per_pixel), 1)
    if factor == 1:
        return None
    try:
        image = _decode_at(data, header, factor)
    except Exception:  # Pillow raises many types; the full decode reports what is wrong
        return None
    boxes = np.concatenate([each["box"] for each in params]) / factor
    # A last row or column of less than `factor` pixels comes first if the upright image counts from the other end.
    height, width = header.upright_size
    boxes[:, 0] += -height % factor / factor * (header.orientation in _ROWS_REVERSED)
    boxes[:, 1] += -width % factor / factor * (header.orientation in _COLUMNS_REVERSED)
    return ScaledImage(image, boxes)


def _decode_at(data: NDArray[np.uint8], header: Header, factor: int) -> Tensor:
    """Decode a JPEG to (3, h, w) at 1/factor of its size. Raises if that is not possible."""
    with open_by_pillow(data.data) as image:
        image.draft(None, (header.width // factor, header.height // factor))
        image.load()
        if image.size != (-(-header.width // factor), -(-header.height // factor)):
            raise ValueError(f"decoded to {image.size}")
        if image.mode not in ("L", "RGB"):  # Pillow and torchvision convert CMYK differently
            raise ValueError(f"pixels of {image.mode}")
        pixels = upright(np.array(image if image.mode == "RGB" else image.convert("RGB")), header.orientation)
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def crop_exactly(image: Tensor, recipe: Augmentation, box: NDArray[np.float64], flip: bool) -> Tensor:
    """Crop, resize and flip an image (3, h, w) uint8 to (S, S, 3). box: (4,), not rounded to pixels."""
    top, left, height, width = box.tolist()
    rows = slice(int(top), math.ceil(top + height))
    columns = slice(int(left), math.ceil(left + width))
    left, top = left - columns.start, top - rows.start
    cropped = Image.fromarray(image[:, rows, columns].permute(1, 2, 0).contiguous().numpy())
    view = cropped.resize(
        (recipe.image_size, recipe.image_size),
        _RESAMPLING[recipe.interpolation],
        (left, top, left + width, top + height),
    )
    if flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(view))
