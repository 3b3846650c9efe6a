"""Decoding of images in common formats: to upright 8-bit RGB, or to the channels and depth that they have."""

import io
import re
from collections.abc import Callable

import numpy as np
import torch
import torchvision  # noqa: F401  # registers torch.ops.image
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastsimclr.data.pixels import RGB8, PixelFormat
from fastsimclr.data.raw import decode_npy, decode_tiff, is_npy, is_tiff, to_image
from fastsimclr.errors import UserError

# Pillow loads its formats lazily; a thread that opens a file meanwhile would fail to identify its format.
Image.init()

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
# torchvision's decoders without their Python wrapper, which from 0.29 warns of its removal at each image. If they were
# removed or not built, Pillow decodes the same pixels 20 % slower.
_decode_web = getattr(torch.ops.image, "decode_image", None)
_UNCHANGED, _RGB = 0, 3  # torchvision.io.ImageReadMode
_WEBP_EXIF, _WEBP_ANIMATION = 0x08, 0x02  # flags of an extended WebP's header


def decode(data: NDArray[np.uint8], name: str, pixels: PixelFormat = RGB8) -> Tensor:
    """Decode the image in `data` to (C, H, W) in the format `pixels`, upright by its EXIF tag.

    As 8-bit RGB, 16 bits are reduced to 8 and alpha is dropped. For any other format the image must have it.
    name: name of the image in an error. Raises UserError if the image cannot be decoded completely, has another format,
    or has values that are not finite or not in the format's range.
    """
    if (pixels.channels, pixels.dtype) == (RGB8.channels, RGB8.dtype):
        return _decode(data, name, _to_rgb8)
    image = decode_raw(data, name)
    pixels.check(image, name)
    return image


def decode_raw(data: NDArray[np.uint8], name: str) -> Tensor:
    """Decode the image in `data` to (C, H, W) with the channels and the dtype that it has. Raises UserError."""
    return _decode(data, name, _as_it_is)


def _decode(data: NDArray[np.uint8], name: str, decoder: Callable[[NDArray[np.uint8]], Tensor]) -> Tensor:
    try:
        return decoder(data)
    except Exception as error:  # each decoder raises its own types
        reason = _reason(error)
        raise UserError(
            f"{name}: got {len(data)} bytes that do not decode as an image ({reason}); expected a complete image: "
            "remove or replace the file"
        ) from error


def _to_rgb8(data: NDArray[np.uint8]) -> Tensor:
    if _decode_web is not None and is_web_format(data):
        image = _decode_web(torch.from_numpy(data), _RGB, True)  # True: apply the EXIF orientation
        return image if image.dtype == torch.uint8 else (image.to(torch.int32) >> 8).to(torch.uint8)
    if is_npy(data):
        image = decode_npy(data)
        if (image.shape[0], image.dtype) != (3, torch.uint8):
            raise ValueError(f"pixels of {str(image.dtype)[6:]}, {image.shape[0]} channels, expected uint8, 3 channels")
        return image
    with Image.open(io.BytesIO(data.tobytes())) as opened:
        return torch.from_numpy(to_rgb(opened)).permute(2, 0, 1)


def _as_it_is(data: NDArray[np.uint8]) -> Tensor:
    if is_npy(data):
        return decode_npy(data)
    if is_tiff(data):
        return decode_tiff(data)
    if _decode_web is not None and is_web_format(data):
        return _decode_web(torch.from_numpy(data), _UNCHANGED, True)
    with Image.open(io.BytesIO(data.tobytes())) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            return to_image(np.asarray(image).astype(np.uint16)[:, :, None])
        if image.mode not in ("L", "RGB", "RGBA"):
            image = image.convert("RGB")
        return to_image(np.atleast_3d(np.asarray(image)))


def is_web_format(data: NDArray[np.uint8]) -> bool:
    """Return whether `data` is JPEG, PNG or a plain WebP: the formats that all decoders used here decode equally."""
    head = data[:21].tobytes()
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        # torchvision ignores the orientation of a WebP, DALI rejects it, and neither decodes an animation
        return not (head[12:16] == b"VP8X" and head[20] & (_WEBP_EXIF | _WEBP_ANIMATION))
    return head[:3] == b"\xff\xd8\xff" or head[:4] == b"\x89PNG"


def as_ppm(image: Tensor) -> NDArray[np.uint8]:
    """Encode an image (3, H, W) uint8 as the bytes of a PPM file: a short header and the raw pixels."""
    header = f"P6 {image.shape[2]} {image.shape[1]} 255\n".encode()
    return np.concatenate([np.frombuffer(header, np.uint8), image.permute(1, 2, 0).reshape(-1).numpy()])


def _reason(error: Exception) -> str:
    """Return a decoder's message without source locations and object addresses."""
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    return re.sub(r"^.*\.cpp:\d+,? *", "", (str(error) or type(error).__name__).splitlines()[0])[:120]


def to_rgb(opened: Image.Image) -> NDArray[np.uint8]:
    """Return an image as upright 8-bit RGB (H, W, 3); 16 bits are reduced to 8."""
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16 bits in I or I;16: Pillow's conversion would clip
        gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))
