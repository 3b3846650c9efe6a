"""Decoding of images with any number of channels to the depth that they have: .npy arrays and TIFF."""

import io
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.data.headers import Header, read_npy_header
from fastsimclr.data.pixels import DTYPES, MAX_CHANNELS

# For each orientation: whether to transpose, then to flip vertically and horizontally.
_TO_UPRIGHT = {2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}
_WHITE_IS_ZERO, _PALETTE, _YCBCR = 0, 3, 6  # photometric interpretations of TIFF
_UNCOMPRESSED = 1


def decode_npy(data: NDArray[np.uint8]) -> NDArray[Any]:
    """Return the array (H, W) or (H, W, C) of a .npy file as (H, W, C), without a copy. Raises ValueError."""
    shape, is_fortran, dtype, offset = read_npy_header(data.data)
    check_format(np.dtype(dtype), shape[2] if len(shape) == 3 else 1)
    # np.load would allocate what the header claims.
    if prod(shape) * dtype.itemsize > len(data) - offset:
        raise ValueError(f"an array of shape {shape} in {len(data) - offset} bytes")
    array = np.frombuffer(data, dtype, prod(shape), offset).reshape(shape, order="F" if is_fortran else "C")
    return np.atleast_3d(array)


def decode_tiff(data: NDArray[np.uint8], header: Header, max_pixels: int, name: str) -> NDArray[Any]:
    """Decode the first image of a TIFF to (H, W, C) of its dtype, as stored; its bands or pages are the channels.

    WhiteIsZero is inverted, a palette becomes 8-bit RGB. Raises ValueError, and UserError for more than `max_pixels`.
    """
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("tifffile, which decodes TIFF, is not installed: pip install tifffile") from error
    with tifffile.TiffFile(io.BytesIO(data.data)) as file:
        series, page = file.series[0], file.pages.first
        height, width = (series.axes.index(side) for side in "YX")
        others = [axis for axis in range(len(series.shape)) if axis not in (height, width)]
        if sum(series.shape[axis] > 1 for axis in others) > 1:
            raise ValueError(f"axes {series.axes} of sizes {series.shape}, expected Y, X and one axis of channels")
        shape = (series.shape[height], series.shape[width], prod(series.shape[axis] for axis in others))
        replace(header, height=shape[0], width=shape[1], bands=shape[2]).check_pixels(max_pixels, name)
        check_format(series.dtype, shape[2])
        kind = int(page.photometric)
        if page.bitspersample < 8 or (kind == _YCBCR and page.compression == _UNCOMPRESSED):
            raise ValueError(f"{page.bitspersample} bits of {page.photometric!s}, expected 8, 16 or 32 bits, no YCbCr")
        array = series.asarray().transpose(height, width, *others).reshape(shape)
        if kind == _PALETTE:
            return (np.asarray(page.colormap) >> 8).astype(np.uint8)[:, array[:, :, 0]].transpose(1, 2, 0)
        if kind == _WHITE_IS_ZERO:
            if array.dtype.kind == "f":
                raise ValueError("floats of which 0 is white, expected 0 for black")
            return (1 << page.bitspersample) - 1 - array
    return array


def check_format(dtype: "np.dtype[Any] | None", channels: int) -> None:
    """Raise ValueError for a dtype or number of channels that images cannot have."""
    if dtype is None or dtype.name not in DTYPES:
        raise ValueError(f"pixels of {dtype}, expected {', '.join(DTYPES)}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"{channels} channels, expected 1 to {MAX_CHANNELS} channels, last")


def upright(array: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return a view of an image (H, W, C) turned upright by its EXIF orientation."""
    transpose, vertically, horizontally = _TO_UPRIGHT.get(orientation, (0, 0, 0))
    if transpose:
        array = array.swapaxes(0, 1)
    return array[:: -1 if vertically else 1, :: -1 if horizontally else 1]


def to_image(array: NDArray[Any]) -> Tensor:
    """Copy (H, W, C) to (C, H, W), channels-last, in the machine's byte order."""
    check_format(array.dtype, array.shape[2])
    array = np.array(array, array.dtype.newbyteorder("="), order="C")  # a copy: writable
    return torch.from_numpy(array).permute(2, 0, 1)
