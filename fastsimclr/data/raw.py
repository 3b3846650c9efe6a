"""Decoding of images with any number of channels to the depth that they have: .npy arrays, TIFF, 16-bit PNG."""

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.data.pixels import DTYPES, MAX_CHANNELS

NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
_ORIENTATION = 274  # TIFF tag
# For each orientation: whether to transpose, then to flip vertically and horizontally.
_TO_UPRIGHT = {2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}


def is_npy(data: NDArray[np.uint8]) -> bool:
    return data[: len(NPY)].tobytes() == NPY


def is_tiff(data: NDArray[np.uint8]) -> bool:
    return data[:4].tobytes() in _TIFF


def decode_npy(data: NDArray[np.uint8]) -> Tensor:
    """Decode an array (H, W) or (H, W, C) to (C, H, W) of its dtype. Raises ValueError for other arrays."""
    array = np.load(io.BytesIO(data.tobytes()), allow_pickle=False)
    if array.ndim not in (2, 3):
        raise ValueError(f"an array of shape {array.shape}, expected (H, W) or (H, W, C)")
    return to_image(np.atleast_3d(array))


def decode_tiff(data: NDArray[np.uint8]) -> Tensor:
    """Decode the first image of a TIFF to (C, H, W) of its dtype, upright; its bands or pages are the channels."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("tifffile, which decodes TIFF, is not installed: pip install tifffile") from error
    with tifffile.TiffFile(io.BytesIO(data.tobytes())) as file:
        series = file.series[0]
        array: NDArray[Any] = series.asarray()
        page: Any = file.pages[0]
        orientation = int(page.tags[_ORIENTATION].value) if _ORIENTATION in page.tags else 1
    sides = [series.axes.index(side) for side in "YX"]
    others = [axis for axis in range(array.ndim) if axis not in sides]
    if sum(array.shape[axis] > 1 for axis in others) > 1:
        raise ValueError(f"axes {series.axes} of sizes {array.shape}, expected Y, X and one axis of channels")
    array = array.transpose(*sides, *others).reshape(*(array.shape[side] for side in sides), -1)
    transpose, vertically, horizontally = _TO_UPRIGHT.get(orientation, (0, 0, 0))
    if transpose:
        array = array.swapaxes(0, 1)
    return to_image(array[:: -1 if vertically else 1, :: -1 if horizontally else 1])


def to_image(array: NDArray[Any]) -> Tensor:
    """Copy (H, W, C) to (C, H, W), channels-last, in the machine's byte order. Raises ValueError for other formats."""
    if array.dtype.name not in DTYPES:
        raise ValueError(f"pixels of {array.dtype.name}, expected {', '.join(DTYPES)}")
    if not 1 <= array.shape[2] <= MAX_CHANNELS or array.size == 0:
        raise ValueError(f"(H, W, C) of {array.shape}, expected 1 to {MAX_CHANNELS} channels, last")
    array = np.array(array, array.dtype.newbyteorder("="), order="C")  # a copy: writable
    return torch.from_numpy(array).permute(2, 0, 1)
