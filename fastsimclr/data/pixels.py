"""What the pixels of decoded images are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.errors import UserError

MAX_CHANNELS = 16
DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}


@dataclass(frozen=True)
class PixelFormat:
    """Channels, dtype and value range of the decoded images of a source."""

    channels: int = 3
    """Number of channels, 1 to 16."""
    dtype: torch.dtype = torch.uint8
    """torch.uint8, torch.uint16 or torch.float32."""
    value_range: tuple[float, float] = (0.0, 255.0)
    """Values that become 0 and 1 in `mean` and `std`."""

    def __str__(self) -> str:
        return f"{count_channels(self.channels)} of {dtype_name(self.dtype)}"

    def image_bytes(self, height: int, width: int) -> int:
        """Return the size of a decoded image."""
        return self.channels * self.dtype.itemsize * int(height) * int(width)

    def to_unit(self, values: Tensor) -> Tensor:
        """Map values of this format to float32 in [0, 1]."""
        return self.to_unit_(values.to(torch.float32, copy=True))

    def to_unit_(self, values: Tensor) -> Tensor:
        """Do the same in place, for float32 values; interpolated ones may exceed the range."""
        low, high = self.value_range
        return values.sub_(low).mul_(1 / (high - low)).clamp_(0, 1)

    def for_display(self, image: Tensor, shown: Sequence[int] = (0, 1, 2)) -> Tensor:
        """Convert the channels `shown` of an image (C, H, W) of this format to (H, W, 3) uint8."""
        channels_last = image.permute(1, 2, 0)
        if self == RGB8 and tuple(shown) == (0, 1, 2):
            return channels_last
        return self.to_unit(channels_last[..., list(shown)]).mul_(255).round_().to(torch.uint8)

    def check(self, image: Tensor, name: str) -> None:
        """Raise UserError unless `image` (C, H, W) has this format, and values that are finite and in its range."""
        if (image.shape[0], image.dtype) != (self.channels, self.dtype):
            got = f"{count_channels(image.shape[0])} of {dtype_name(image.dtype)}"
            raise UserError(f"{name}: got {got}; expected {self}, as in the other images: convert or remove it")
        if self == default_format(self.channels, self.dtype) and not self.dtype.is_floating_point:
            return
        low, high = (float(value) for value in image.float().aminmax())
        if not (self.value_range[0] <= low and high <= self.value_range[1]):  # also if they are NaN
            expected = f"{self.value_range[0]:g} to {self.value_range[1]:g}"
            if not torch.isfinite(image).all():
                raise UserError(f"{name}: got values that are NaN or infinite; expected finite values from {expected}")
            raise UserError(
                f"{name}: got values from {low:g} to {high:g}; expected {expected}: set --data.value_range to the "
                "range of all images"
            )


RGB8 = PixelFormat()
"""8-bit RGB."""


def default_format(channels: int, dtype: torch.dtype) -> PixelFormat:
    """Return the format of images that use the whole range of an integer dtype, or are floats from 0 to 1."""
    return PixelFormat(channels, dtype, (0.0, 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)))


def format_of(options: PixelOptions) -> PixelFormat:
    """Return the format that a run's configuration records: 8-bit RGB unless it states type and channels."""
    if options.pixels is None or options.channels is None:
        return RGB8
    of_dtype = default_format(options.channels, DTYPES[options.pixels])
    return replace(of_dtype, value_range=options.value_range) if options.value_range else of_dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def count_channels(channels: int) -> str:
    return "1 channel" if channels == 1 else f"{channels} channels"
