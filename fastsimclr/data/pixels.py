"""What the pixels of decoded images are."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PixelFormat:
    """Channels, dtype and value range of the decoded images of a source."""

    channels: int = 3
    """Number of channels, 1 to 16."""
    dtype: torch.dtype = torch.uint8
    """torch.uint8, torch.uint16 or torch.float32."""
    value_range: tuple[float, float] = (0.0, 255.0)
    """Values that become 0 and 1 in `mean` and `std`."""


RGB8 = PixelFormat()
"""8-bit RGB."""


def default_format(channels: int, dtype: torch.dtype) -> PixelFormat:
    """Return the format of images that use the whole range of an integer dtype, or are floats from 0 to 1."""
    return PixelFormat(channels, dtype, (0.0, 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)))
