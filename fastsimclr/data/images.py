"""Decoding of images in common formats: to upright 8-bit RGB, or to the channels and depth that they have."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401  # registers torch.ops.image
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor

from fastsimclr.data.headers import Header, not_decodable, open_by_pillow, read_header, without_pillow_limit
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.pixels import RGB8, PixelFormat
from fastsimclr.data.png import decode_png, open_png
from fastsimclr.data.raw import decode_npy, decode_tiff, to_image, upright
from fastsimclr.errors import UserError

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".npy"
)  # fmt: skip
# torchvision's decoders without their Python wrapper, which from 0.29 warns of its removal at each image. If they were
# removed or not built, Pillow decodes the same pixels 20 % slower.
_decode_web = getattr(torch.ops.image, "decode_image", None)
_UNCHANGED, _RGB = 0, 3  # torchvision.io.ImageReadMode
_WEBP_EXIF, _WEBP_ANIMATION = 0x08, 0x02  # flags of an extended WebP's header


def decode(
    data: NDArray[np.uint8],
    name: str,
    pixels: PixelFormat = RGB8,
    max_pixels: int = PixelOptions.max_pixels,
    header: Header | None = None,
) -> Tensor:
    """Decode the image in `data` to (C, H, W) in the format `pixels`, upright by its EXIF orientation.

    As 8-bit RGB: gray, palettes and CMYK are converted, alpha is dropped, and of 16 bits the upper 8 are kept; floats,
    signed and 32-bit integers, and .npy arrays of another format are refused. For any other `pixels`, the image must
    have that format. Of an animation, the first image is decoded; so is the first page of a TIFF as 8-bit RGB.
    name: name of the image in an error. max_pixels: largest number of pixels, checked before decoding.
    header: that of `data`, if it has been read and its pixels checked.
    Raises UserError if the image cannot be decoded completely, is larger, has another format, or has values that are
    not finite or not in the format's range.
    """
    if (pixels.channels, pixels.dtype) == (RGB8.channels, RGB8.dtype):
        return _decode(data, name, max_pixels, _to_rgb8, header)
    image = decode_raw(data, name, max_pixels)
    pixels.check(image, name)
    return image


def decode_raw(data: NDArray[np.uint8], name: str, max_pixels: int = PixelOptions.max_pixels) -> Tensor:
    """Decode the image in `data` to (C, H, W) with the channels and the dtype that it has. Raises UserError.

    A palette becomes RGB; grays of 1 to 4 bits, except in TIFF, become 8 bits.
    """
    return _decode(data, name, max_pixels, lambda data, header: _as_it_is(data, header, max_pixels, name))


def _decode(
    data: NDArray[np.uint8],
    name: str,
    max_pixels: int,
    decoder: Callable[[NDArray[np.uint8], Header], Tensor],
    header: Header | None = None,
) -> Tensor:
    if header is None:
        header = read_header(data, name)
        header.check_pixels(max_pixels, name)
    try:
        image = decoder(data, header)
        if tuple(image.shape[1:]) != header.upright_size:
            raise ValueError(f"pixels of {tuple(image.shape[1:])}, but a header of {header.upright_size}")
    except UserError:
        raise
    except Exception as error:  # each decoder raises its own types
        raise not_decodable(data, name, _reason(error)) from error
    return image


def _to_rgb8(data: NDArray[np.uint8], header: Header) -> Tensor:
    if _decode_web is not None and _is_for_torchvision(header):
        return _upright(_decode_web(torch.from_numpy(data), _RGB, False), header)
    if header.format == "NPY":
        array = decode_npy(data)
        if (array.dtype.name, array.shape[2]) != ("uint8", 3):
            raise ValueError(f"pixels of {array.dtype}, {array.shape[2]} channels, expected uint8, 3 channels")
        return to_image(array)
    with open_png(data.data) if header.format == "PNG" else open_by_pillow(data.data) as opened:
        image = torch.from_numpy(_to_rgb(opened)).permute(2, 0, 1)
    return image if header.format == "TIFF" else _upright(image, header)  # Pillow turns a TIFF upright


def _as_it_is(data: NDArray[np.uint8], header: Header, max_pixels: int, name: str) -> Tensor:
    if _decode_web is not None and _is_for_torchvision(header):
        return _upright(_decode_web(torch.from_numpy(data), _UNCHANGED, False), header)
    if header.format == "NPY":
        array = decode_npy(data)
    elif header.format == "TIFF":
        array = decode_tiff(data, header, max_pixels, name)
    elif header.format == "PNG":
        array = decode_png(data.data)
    else:
        with open_by_pillow(data.data) as opened:
            array = _own_channels(opened)
    return to_image(upright(array, header.orientation))


def from_pil(image: Image.Image) -> Tensor:
    """Convert an image of Pillow's to upright 8-bit RGB (3, H, W) like `decode`. Raises ValueError."""
    pixels = _to_rgb(image)
    turned = upright(pixels, image.getexif().get(ExifTags.Base.Orientation, 1))
    return torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image as 8-bit RGB (H, W, 3), as stored; of 16 bits the upper 8. Raises ValueError for other depths."""
    if image.mode[0] not in "IF":
        with without_pillow_limit:
            image.load()
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    deep = _own_channels(image)
    if deep.dtype != np.uint16:
        raise ValueError(f"pixels of {deep.dtype}, expected 8 or 16 bits: set --data.pixels {deep.dtype}")
    return np.repeat((deep >> 8).astype(np.uint8), 3, axis=2)


def _own_channels(image: Image.Image) -> NDArray[Any]:
    """Return an image (H, W, C) as stored, of its own depth: uint8, uint16 or float32. Raises ValueError for others."""
    with without_pillow_limit:
        image.load()
    if image.mode == "I" and image.format != "PPM":
        raise ValueError("pixels of signed or 32-bit integers, expected unsigned integers of 8 or 16 bits, or floats")
    if image.mode[0] == "I":
        deep = np.asarray(image).astype(np.uint16)[:, :, None]
        return _scaled(deep, image) if isinstance(image, TiffImageFile) else deep
    if image.mode not in ("L", "LA", "RGB", "RGBA", "F"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return np.atleast_3d(np.asarray(image))


def _scaled(deep: NDArray[np.uint16], image: TiffImageFile) -> NDArray[np.uint16]:
    """Scale 12 bits of a TIFF to 16, and invert WhiteIsZero, neither of which Pillow does for more than 8 bits."""
    scaled = deep << (16 - image.tag_v2[BITSPERSAMPLE][0])
    return ~scaled if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0 else scaled


def _upright(image: Tensor, header: Header) -> Tensor:
    """Turn an image (C, H, W), stored as (H, W, C), upright."""
    if header.orientation == 1:
        return image
    turned = np.ascontiguousarray(upright(image.permute(1, 2, 0).numpy(), header.orientation))
    return torch.from_numpy(turned).permute(2, 0, 1)


def _is_for_torchvision(header: Header) -> bool:
    return header.format == "JPEG" or (header.format == "WEBP" and not header.is_animated)


def is_web_format(data: NDArray[np.uint8]) -> bool:
    """Return whether `data` is JPEG, PNG or a plain WebP: the formats that DALI decodes as `decode` does."""
    head = data[:21].tobytes()
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        # DALI rejects the orientation of a WebP, and does not decode an animation
        return not (head[12:16] == b"VP8X" and head[20] & (_WEBP_EXIF | _WEBP_ANIMATION))
    return head[:3] == b"\xff\xd8\xff" or head[:4] == b"\x89PNG"


def as_ppm(image: Tensor) -> NDArray[np.uint8]:
    """Encode an image (3, H, W) uint8 as the bytes of a PPM file: a short header and the raw pixels."""
    header = f"P6 {image.shape[2]} {image.shape[1]} 255\n".encode()
    return np.concatenate([np.frombuffer(header, np.uint8), image.permute(1, 2, 0).reshape(-1).numpy()])


def _reason(error: Exception) -> str:
    """Return a decoder's message without source locations and object addresses."""
    return re.sub(r"^.*\.cpp:\d+,? *", "", (str(error) or type(error).__name__).splitlines()[0])[:120]
