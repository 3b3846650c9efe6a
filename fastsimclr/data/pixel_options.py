"""The options for the pixels of images. Uses no framework."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from fastsimclr.errors import UserError
from fastsimclr.ranges import Channels, Count, Finite, check_fields


@dataclass(frozen=True)
class PixelOptions:
    """What the user states about the pixels of the images. The defaults read image files as 8-bit RGB."""

    _prefix: ClassVar[str] = "--data."

    pixels: Literal["uint8", "uint16", "float32"] | None = None
    """Decode image files to the channels and depth that they have, which must be this type: uint8, uint16 (16-bit PNG
    and TIFF) or float32. null: image files become 8-bit RGB, which keeps the upper 8 of 16 bits and drops alpha; .npy
    files, arrays and Datasets keep their own type."""
    channels: Channels | None = None
    """Number of channels that the images must have, 1 to 16. Image files are then not converted to RGB. null: 3 for
    image files; as they are for .npy files, arrays, Datasets and with data.pixels."""
    value_range: tuple[Finite, Finite] | None = None
    """Values that become 0 and 1 before data.mean and data.std are applied, such as [0, 4095] for 12 bits in uint16.
    null: 0 to 255, 65535 or 1 by the type."""
    max_pixels: Count = 200_000_000
    """Largest image to decode, in pixels (of images of more than 4 channels, each counts). A larger one is unusable: it
    is found by its header, before it takes memory."""
    scaled_decode: Literal["auto", "off"] = "auto"
    """"auto": decode a JPEG of 2 million pixels or more at 1/2, 1/4 or 1/8 of its size if each of its crops is then
    still at least as large as its view. The random parameters stay the same. Views of 224x224 from photographs of
    4000x3000 differ from those of a full decode by 0.8 levels of 255 on average. "off": always decode in full."""

    def __post_init__(self) -> None:
        check_fields(self, self._prefix)
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise UserError(f"--data.value_range: got {list(self.value_range)}, expected [low, high] with low < high")

    def pixel_options(self) -> "PixelOptions":
        """Return only these options."""
        return PixelOptions(**{f.name: getattr(self, f.name) for f in fields(PixelOptions)})

    @staticmethod
    def from_config(data: dict[str, Any]) -> "PixelOptions":
        """Return the options given by section `data` of a run's configuration; its other options are ignored."""
        given = {f.name: data[f.name] for f in fields(PixelOptions) if f.name in data}
        if given.get("value_range") is not None:
            given["value_range"] = tuple(given["value_range"])
        return PixelOptions(**given)
