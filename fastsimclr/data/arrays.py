"""Images in an array: a NumPy array or tensor in memory, or a memory-mapped file."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.data.labels import encode_labels
from fastsimclr.data.pixels import default_format
from fastsimclr.data.sources import NO_LABEL, ArraySource, DecodedSource
from fastsimclr.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's from Python 3.11

_EXPECTED = "(N, H, W, C) or (N, H, W), with 1 to 16 channels"
_DTYPES = (torch.uint8, torch.uint16, torch.float32)


class MappedSource(DecodedSource):
    """Images of one size in a memory-mapped file, of which only the images in use are read."""

    def __init__(
        self, title: str, images: "np.memmap[Any, Any]", labels: NDArray[np.int64], classes: Sequence[str]
    ) -> None:
        """images: (N, H, W, C)."""
        self.title, self.images, self.labels, self.classes = title, images, labels, classes
        self.rows = np.arange(len(images))  # row of each image in `images`
        dtype = _torch_dtype(images.dtype)
        assert dtype is not None, images.dtype
        self.pixels = default_format(images.shape[3], dtype)

    def name(self, index: int) -> str:
        return f"{self.title}[{self.rows[index]}]"

    def image(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.images[self.rows[index]])).permute(2, 0, 1)

    def subset(self, indices: NDArray[np.int64]) -> "Self":
        part = self._part(indices)
        part.rows = self.rows[indices]
        return part


def is_array(data: Any) -> bool:
    return isinstance(data, np.ndarray | Tensor)


def open_array(images: Any, labels: Any = None, title: str = "array") -> ArraySource | MappedSource:
    """Open images (N, H, W, C) or (N, H, W): uint8, uint16 or float32. A memory-mapped array stays on disk.

    labels: (N,) integers or names of classes. title: name in messages. Raises UserError for other shapes and dtypes.
    """
    dtype = _torch_dtype(images.dtype) if isinstance(images, np.ndarray) else images.dtype
    if dtype not in _DTYPES:
        raise UserError(
            f"{title}: got an array of {str(images.dtype).removeprefix('torch.')}, expected uint8, uint16 or float32 "
            "(from 0 to 1): convert it"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape or images.shape[3] > 16:
        hint = "; move the channels last" if images.ndim == 4 and images.shape[1] <= 16 else ""
        raise UserError(f"{title}: got an array of shape {tuple(images.shape)}, expected {_EXPECTED}{hint}")
    encoded: NDArray[np.int64] = np.full(len(images), NO_LABEL)
    classes: Sequence[str] = ()
    if labels is not None:
        encoded, classes = encode_labels(labels, title)
        if len(encoded) != len(images):
            raise UserError(f"{title}: got {len(images)} images and {len(encoded)} labels, expected as many of both")
    if isinstance(images, np.memmap):
        return MappedSource(title, images, encoded, classes)
    if isinstance(images, np.ndarray):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # the images are not written to
            images = torch.from_numpy(np.ascontiguousarray(images))
    return ArraySource(title, images.detach().contiguous(), encoded, classes)


def open_array_file(path: str) -> ArraySource | MappedSource:
    """Open NAME.npy, memory-mapped, with the labels of NAME.labels.npy if that exists."""
    labels = Path(path).with_suffix(".labels.npy")
    return open_array(_load(path, "r"), _load(str(labels), None) if labels.exists() else None, path)


def _load(path: str, mmap_mode: Any) -> Any:
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: got a file that NumPy cannot read ({error}), expected an array of {_EXPECTED}"
        ) from error


def _torch_dtype(dtype: "np.dtype[Any]") -> torch.dtype | None:
    """Return the dtype in torch; None if torch has none for it, as for other byte orders."""
    return getattr(torch, dtype.name, None) if dtype.isnative else None
