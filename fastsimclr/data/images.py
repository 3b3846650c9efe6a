"""Encoded images of any common kind, decoded to upright RGB."""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from fastsimclr.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_EXIF_ORIENTATION = 0x0112


def decode(data: NDArray[np.uint8], name: str) -> Tensor:
    """The image in `data` as (3, H, W) uint8: RGB, upright by its EXIF tag, 16 bits reduced to 8, alpha dropped.

    Raises UserError, with `name`, if it cannot be read whole.
    """
    try:
        if is_web_format(data):
            image = decode_image(torch.from_numpy(data), mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return image if image.dtype == torch.uint8 else (image.to(torch.int32) >> 8).to(torch.uint8)
        with Image.open(io.BytesIO(data.tobytes())) as opened:
            return torch.from_numpy(_to_rgb(opened)).permute(2, 0, 1)
    except Exception as error:  # each decoder raises its own kinds, for the same cause
        reason = str(error).splitlines()[0].split("decode_jpeg, ")[-1][:120] if str(error) else type(error).__name__
        raise UserError(
            f"{name}: got {len(data)} bytes that do not decode as an image ({reason}); expected a whole image: "
            "remove or replace the file"
        ) from error


def is_web_format(data: NDArray[np.uint8]) -> bool:
    """Whether these bytes begin as JPEG, PNG or WebP: the formats that every decoder here reads alike."""
    head = data[:12].tobytes()
    return head[:3] == b"\xff\xd8\xff" or head[:4] == b"\x89PNG" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def upright_size(data: NDArray[np.uint8], name: str) -> tuple[int, int]:
    """(height, width) of the decoded image, from its header alone. Raises UserError as `decode`."""
    try:
        with Image.open(io.BytesIO(data.tobytes())) as opened:
            width, height = opened.size
            turned = opened.getexif().get(_EXIF_ORIENTATION, 1) >= 5  # 5 to 8 exchange the sides
    except Exception as error:
        raise UserError(
            f"{name}: got {len(data)} bytes without an image's header; expected an image: remove or replace the file"
        ) from error
    return (width, height) if turned else (height, width)


def as_ppm(image: Tensor) -> NDArray[np.uint8]:
    """(3, H, W) uint8 as the bytes of a PPM file: raw pixels behind a header of three numbers."""
    header = f"P6 {image.shape[2]} {image.shape[1]} 255\n".encode()
    return np.concatenate([np.frombuffer(header, np.uint8), image.permute(1, 2, 0).reshape(-1).numpy()])


def _to_rgb(opened: Image.Image) -> NDArray[np.uint8]:
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16 bits in I or I;16: Pillow's own conversion would clip
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))
