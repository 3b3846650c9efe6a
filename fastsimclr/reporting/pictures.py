"""Image files as data: URIs of a size that a page can bear."""

import base64
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

WIDEST = 1600
TALLEST = 16383  # of a WebP


@dataclass(frozen=True)
class Picture:
    """uri: its bytes; width and height in pixels."""

    uri: str
    width: int
    height: int


def embedded(file: Path) -> Picture:
    """The picture in `file`, no wider than WIDEST. Raises OSError or ValueError if it can't be read."""
    data, kind = file.read_bytes(), "png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a sheet of a hundred images is that large
        opened = Image.open(io.BytesIO(data))
        image = opened.convert("RGB")
    narrow = image.width <= WIDEST and opened.format == "PNG"
    if image.width > WIDEST:
        image = image.resize((WIDEST, max(1, round(image.height * WIDEST / image.width))), Image.Resampling.LANCZOS)
    packed = io.BytesIO()
    smaller = "webp" if image.height <= TALLEST else "jpeg"
    image.save(packed, smaller, quality=85)
    if not (narrow and len(data) <= packed.tell()):
        data, kind = packed.getvalue(), smaller
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", image.width, image.height)
