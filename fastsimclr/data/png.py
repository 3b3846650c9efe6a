"""Decoding of PNG by Pillow, from the chunks of its pixels alone, whose checksums are verified first.

torchvision's decoder ends the process by SIGSEGV on pixels that libpng rejects, and only a full decode can tell which
those are. Pillow does not verify the checksums of the pixels, and rejects good images for long texts.
"""

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from fastsimclr.data.headers import open_by_pillow

_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_BITS_AT, _COLOR_TYPE_AT, _GRAY_ALPHA = 24, 25, 4
_ANCILLARY = 0x20  # bit of the first letter of a chunk that a decoder may skip


def open_png(data: memoryview) -> ImageFile.ImageFile:
    """Open a PNG with Pillow, without transparency and metadata. Raises ValueError if it is damaged."""
    return open_by_pillow(_pixel_chunks(data))


def decode_png(data: memoryview) -> NDArray[Any]:
    """Decode a PNG to (H, W, C) of its channels: uint8, or uint16 for 16 bits. A palette becomes RGB."""
    chunks = _pixel_chunks(data)
    opened: Image.Image = open_by_pillow(chunks)
    if data[_BITS_AT] == 16 and opened.mode != "I;16":
        # Of 16 bits in several channels, Pillow keeps the upper 8. Other raw modes of the same size give all bytes.
        if data[_COLOR_TYPE_AT] == _GRAY_ALPHA:
            return _decode_as("RGBA", chunks).view(">u2")
        low = _decode_as(f"{opened.mode};16L", chunks)
        return np.asarray(opened).astype(np.uint16) << 8 | low
    if opened.mode in ("1", "P"):
        opened = opened.convert("L" if opened.mode == "1" else "RGB")
    return np.atleast_3d(np.asarray(opened))


def _decode_as(raw_mode: str, chunks: bytes) -> NDArray[np.uint8]:
    """Decode a PNG as if its pixels were stored in another of Pillow's raw modes, which has the same size."""
    opened = open_by_pillow(chunks)
    opened.tile = [opened.tile[0]._replace(args=raw_mode)]
    return np.array(opened)


def _pixel_chunks(data: memoryview) -> bytes:
    """Return the PNG reduced to the chunks that define its pixels. Raises ValueError if one of them is damaged."""
    kept, at = [data[:8]], 8
    while at < len(data) - 11:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind in _PIXEL_CHUNKS:
            if end > len(data):
                raise ValueError("it is truncated")
            if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise ValueError(f"wrong checksum of {kind.decode()}")
            kept.append(data[at:end])
        elif not kind[0] & _ANCILLARY:
            raise ValueError(f"unknown chunk {kind!r}")
        at = end
    return b"".join(kept)
