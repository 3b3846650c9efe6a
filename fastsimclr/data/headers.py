"""Headers of image files: format, size, orientation and animation, read without decoding the pixels.

Every loader takes sizes and orientation from here, because the decoders' own readers disagree: for instance about EXIF
after XMP, an orientation of type LONG, or text of megabytes. Only EXIF is read, not the orientation in XMP.
"""

import io
import struct
import threading
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from PIL import Image, ImageFile

from fastsimclr.errors import UserError

# Pillow loads its formats lazily; a thread that opens a file meanwhile would fail to identify its format.
Image.init()

# Formats read by Pillow. Not all that it knows: some have no signature, EPS runs Ghostscript.
PILLOW_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_JPEG, _PNG, _NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
_EXIF = b"Exif\0"  # then one byte
_WIDTH, _HEIGHT, _BITS, _ORIENTATION = 256, 257, 258, 274  # TIFF tags
_INTEGER_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # TIFF type to struct format
_WEBP_ANIMATION = 0x02  # flag of an extended WebP


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of an image file says."""

    format: str
    """"NPY", or one of PILLOW_FORMATS."""
    height: int
    """Height as stored, in pixels."""
    width: int
    """Width as stored, in pixels."""
    orientation: int = 1
    """EXIF orientation, 1 to 8; 1 if there is none or another value."""
    bits: int = 8
    """Bits per channel, of PNG, TIFF and PGM."""
    bands: int = 1
    """Bands of a .npy array."""
    is_animated: bool = False
    """Whether it is an animated WebP; its first frame is the image."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) of the image turned upright."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    def check_pixels(self, max_pixels: int, name: str) -> None:
        """Raise UserError if the image has more than `max_pixels` pixels; of more than four bands, each counts."""
        sides = (self.height, self.width, self.bands) if self.bands > 4 else (self.height, self.width)
        if prod(sides) > max_pixels:
            raise UserError(
                f"{name}: got {' x '.join(map(str, sides))} = {prod(sides)} pixels, expected at most {max_pixels}: "
                "raise --data.max_pixels, or scale the image down"
            )


class _WithoutPillowLimit:
    """Suspend Pillow's own limit of pixels, a global that warns or raises where `max_pixels` allows an image.

    A context manager that several threads may be in at the same time.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._limit = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                Image.MAX_IMAGE_PIXELS = self._limit


without_pillow_limit = _WithoutPillowLimit()


def read_header(data: NDArray[np.uint8], name: str) -> Header:
    """Return the header of the image file in `data` (1-dim., contiguous). Raises UserError if it has none."""
    try:
        header = _read(data.data)
        if header.height < 1 or header.width < 1:
            raise ValueError("an empty image")
        return header
    except Exception as error:  # each format raises its own types
        reason = str(error) if type(error) is ValueError else "incomplete header"
        raise not_decodable(data, name, reason) from error


def not_decodable(data: NDArray[np.uint8], name: str, reason: str) -> UserError:
    """Return the error for an image file that is damaged, incomplete or none."""
    return UserError(
        f"{name}: got {len(data)} bytes that do not decode as an image ({reason}); expected a complete image: "
        "remove or replace the file"
    )


def read_npy_header(data: memoryview) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
    """Return shape, whether the order is Fortran's, dtype and offset of the values of a .npy file."""
    file = io.BytesIO(data[: 1 << 16])
    version = npy_format.read_magic(file)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    return shape, is_fortran, dtype, file.tell()


def open_by_pillow(data: memoryview | bytes) -> ImageFile.ImageFile:
    """Open an image with Pillow; its pixels are not decoded yet."""
    prefix = bytes(data[:16])
    for name in PILLOW_FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is not None and accept is not None and accept(prefix) is True:
            with without_pillow_limit:
                opened = factory(io.BytesIO(data), "")
            opened.info.pop("xmp", None)  # Pillow turns a TIFF upright also by the orientation in XMP
            return opened
    raise ValueError("unknown format")


def _read(data: memoryview) -> Header:
    head = bytes(data[:16])
    if head[:3] == _JPEG:
        return _read_jpeg(data)
    if head[:8] == _PNG:
        return _read_png(data)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _read_webp(data)
    if head[:4] in _TIFF:
        tags = _read_tags(data, (_WIDTH, _HEIGHT, _BITS, _ORIENTATION))
        return Header("TIFF", tags[_HEIGHT], tags[_WIDTH], _valid(tags.get(_ORIENTATION, 1)), tags.get(_BITS, 1))
    if head[:6] == _NPY:
        shape = read_npy_header(data)[0]
        if len(shape) not in (2, 3):
            raise ValueError(f"an array of shape {shape}, expected (H, W) or (H, W, C)")
        return Header("NPY", shape[0], shape[1], bands=shape[2] if len(shape) == 3 else 1)
    with open_by_pillow(data) as opened:
        assert opened.format is not None
        orientation = _read_orientation(opened.info.get("exif", b""))
        bits = 16 if opened.mode == "I" else 8  # a PGM
        return Header(opened.format, opened.height, opened.width, orientation, bits)


def _read_jpeg(data: memoryview) -> Header:
    """Walk the segments to the frame's, and without EXIF before it on to the start of the scan."""
    size, orientation = None, None
    at, end = 2, len(data) - 9
    while at < end and (size is None or orientation is None):
        if data[at] != 0xFF or data[at + 1] == 0xFF:  # bytes that libjpeg skips, too
            at += 1
            continue
        marker = data[at + 1]
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD7:  # without a length
            at += 2
            continue
        if marker in (0xD8, 0xD9, 0xDA):  # a second image, the end, or the scan
            break
        length = data[at + 2] << 8 | data[at + 3]
        if length < 2:
            break
        if marker == 0xE1 and orientation is None and bytes(data[at + 4 : at + 9]) == _EXIF:
            orientation = _read_orientation(data[at + 4 : at + 2 + length])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and size is None:
            size = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
        at += 2 + length
    if size is None:
        raise ValueError("a JPEG without a frame")
    return Header("JPEG", *size, orientation or 1)


def is_regular_jpeg(data: NDArray[np.uint8]) -> bool:
    """Return whether the header of a JPEG is without faults: what DALI's parser, which corrupts memory at one, expects.

    Its segments follow one another without a gap up to the scan. The only frame is baseline or progressive, of 8 bits,
    and of one, three or four channels.
    """
    view, at, frames = data.data, 2, 0
    while at < len(view) - 10 and view[at] == 0xFF and 0xC0 <= view[at + 1] <= 0xFE:
        marker, length = view[at + 1], view[at + 2] << 8 | view[at + 3]
        if marker == 0xDA:
            return frames == 1 and at + 2 + length < len(view)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xCC):
            bits, channels = view[at + 4], view[at + 9]
            if marker > 0xC2 or bits != 8 or channels not in (1, 3, 4) or length != 8 + 3 * channels:
                return False
            frames += 1
        at += 2 + length
    return False


def _read_png(data: memoryview) -> Header:
    _, kind, width, height, bits = struct.unpack_from(">I4sIIB", data, 8)
    if kind != b"IHDR":
        raise ValueError("a PNG without IHDR")
    at, end, orientation = 8, len(data) - 8, 1
    while at < end:  # EXIF may also be after the pixels
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"eXIf":
            orientation = _read_orientation(data[at + 8 : at + 8 + length])
            break
        at += 12 + length
    return Header("PNG", height, width, orientation, bits)


def _read_webp(data: memoryview) -> Header:
    kind = bytes(data[12:16])
    if kind == b"VP8 ":
        if bytes(data[23:26]) != b"\x9d\x01\x2a":
            raise ValueError("a WebP without a key frame")
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("WEBP", height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L":
        signature, bits = struct.unpack_from("<BI", data, 20)
        if signature != 0x2F:
            raise ValueError("a WebP without a lossless frame")
        return Header("WEBP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise ValueError("a WebP without a frame")
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    if len(data) < 30:
        raise ValueError("a WebP without a canvas")
    at, end, orientation = 12, len(data) - 8, 1
    while at < end:
        name, length = struct.unpack_from("<4sI", data, at)
        if name == b"EXIF":
            orientation = _read_orientation(data[at + 8 : at + 8 + length])
            break
        at += 8 + length + length % 2
    return Header("WEBP", height, width, orientation, is_animated=bool(data[20] & _WEBP_ANIMATION))


def _read_orientation(exif: bytes | memoryview) -> int:
    """Return the orientation in EXIF data, which may begin with "Exif"; 1 if there is none that is valid."""
    try:
        exif = memoryview(exif)
        return _valid(_read_tags(exif[6:] if bytes(exif[:5]) == _EXIF else exif, (_ORIENTATION,)).get(_ORIENTATION, 1))
    except (LookupError, ArithmeticError, struct.error):
        return 1


def _valid(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1


def _read_tags(tiff: memoryview, wanted: tuple[int, ...]) -> dict[int, int]:
    """Return the first value of each of the `wanted` integer tags in the first directory of a TIFF."""
    order = {b"II": "<", b"MM": ">"}[bytes(tiff[:2])]
    (version,) = struct.unpack_from(order + "H", tiff, 2)
    is_big = version == 43
    (start,) = struct.unpack_from(order + ("Q" if is_big else "I"), tiff, 8 if is_big else 4)
    (count,) = struct.unpack_from(order + ("Q" if is_big else "H"), tiff, start)
    start += 8 if is_big else 2
    entry = struct.Struct(order + ("HHQ8s" if is_big else "HHI4s"))
    count = min(count, (len(tiff) - start) // entry.size)
    found: dict[int, int] = {}
    for tag, kind, values, value in entry.iter_unpack(tiff[start : start + count * entry.size]):
        if tag in wanted and kind in _INTEGER_TYPES and tag not in found:
            integer = struct.Struct(order + _INTEGER_TYPES[kind])
            if values * integer.size > len(value):  # the value is its offset
                (at,) = struct.unpack(order + ("Q" if is_big else "I"), value)
                found[tag] = integer.unpack_from(tiff, at)[0]
            else:
                found[tag] = integer.unpack_from(value)[0]
            if len(found) == len(wanted):
                break
    return found
