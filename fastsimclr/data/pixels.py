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
