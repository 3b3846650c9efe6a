"""Small real image files of every kind found in data sets, made with Pillow (16-bit RGB PNG with zlib), and sources."""

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastsimclr.data import open_source
from fastsimclr.data.sources import EncodedSource

ORIENTATIONS = range(2, 9)  # EXIF orientation tags; 1 is upright
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # optional real data sets next to the repository


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return (height, width, 3): smooth color gradients, a few hard-edged shapes and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = rng.uniform(1, 5, (3, 2))
    phase = rng.uniform(0, 6, 3)
    picture = 128 + 90 * np.sin(waves[:, 0] * y[..., None] + waves[:, 1] * x[..., None] + phase)
    for _ in range(4):
        top, left, radius = rng.uniform(0, 1, 3) * (1, 1, 0.3)
        picture[(y - top) ** 2 + (x - left) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    return np.clip(picture + rng.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode `image` as a file in Pillow's format `kind`."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def jpeg(pixels: NDArray[np.uint8], **options: object) -> bytes:
    return encode(Image.fromarray(pixels), "JPEG", **{"quality": 95, **options})


def png16_rgb(pixels: NDArray[np.uint16]) -> bytes:
    """Encode a 16-bit RGB PNG, which Pillow reads but cannot write."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def kinds() -> dict[str, bytes]:
    """Encoded images by file name: every mode and container that decoders disagree about. Height and width differ and
    are odd."""
    pixels = photo(61, 83)
    rgb = Image.fromarray(pixels)
    gray = rgb.convert("L")
    alpha = Image.fromarray(np.linspace(0, 255, 61 * 83).reshape(61, 83).astype(np.uint8))
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    deep = pixels.astype(np.uint16) * 256 + photo(61, 83, seed=1)  # decoders drop the low byte
    files = {
        "rgb.jpg": jpeg(pixels),
        "subsampled.jpg": jpeg(pixels, subsampling="4:2:0", quality=85),
        "progressive.jpg": jpeg(pixels, progressive=True),
        "gray.jpg": encode(gray, "JPEG", quality=95),
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG", quality=95),
        "one.jpg": jpeg(pixels[:1, :1]),
        "rgb.png": encode(rgb, "PNG"),
        "gray.png": encode(gray, "PNG"),
        "bits1.png": encode(rgb.convert("1"), "PNG"),
        "palette.png": encode(rgb.quantize(64), "PNG"),
        "palette_transparent.png": encode(rgb.quantize(64), "PNG", transparency=3),
        "rgba.png": encode(rgba, "PNG"),
        "la.png": encode(Image.merge("LA", (gray, alpha)), "PNG"),
        "gray16.png": encode(Image.fromarray(deep[:, :, 0]), "PNG"),
        "rgb16.png": png16_rgb(deep),
        "one.png": encode(rgb.crop((0, 0, 1, 1)), "PNG"),
        "rgb.webp": encode(rgb, "WEBP", lossless=True),
        "lossy.webp": encode(rgb, "WEBP", quality=90),
        "rgba.webp": encode(rgba, "WEBP", lossless=True, exact=True),
        "rgb.bmp": encode(rgb, "BMP"),
        "gray.bmp": encode(gray, "BMP"),
        "palette.gif": encode(rgb.quantize(64), "GIF"),
        "rgb.tif": encode(rgb, "TIFF", compression="tiff_lzw"),
        "gray16.tif": encode(Image.fromarray(deep[:, :, 0]), "TIFF"),
        "cmyk.tif": encode(rgb.convert("CMYK"), "TIFF"),
        "rgb.ppm": encode(rgb, "PPM"),
        "gray.pgm": encode(gray, "PPM"),
    }
    for orientation in ORIENTATIONS:
        files[f"exif{orientation}.jpg"] = jpeg(pixels, exif=exif(orientation))
    for orientation in (3, 6):
        files[f"exif{orientation}.png"] = encode(rgb, "PNG", exif=exif(orientation))
        files[f"exif{orientation}.webp"] = encode(rgb, "WEBP", lossless=True, exif=exif(orientation))
        files[f"exif{orientation}.tif"] = encode(rgb, "TIFF", exif=exif(orientation))
    return files


def broken() -> dict[str, bytes]:
    """Damaged, truncated and non-image files by name."""
    pixels = photo(120, 150, seed=2)
    whole_jpeg, whole_png = jpeg(pixels), encode(Image.fromarray(pixels), "PNG")
    whole_webp = encode(Image.fromarray(pixels), "WEBP", quality=90)
    return {
        "empty.jpg": b"",
        "text.jpg": b"<html><body>404 Not Found</body></html>\n",
        "head.jpg": whole_jpeg[:20],  # ends inside the first segment, before the size
        "tables.jpg": whole_jpeg[:700],  # ends near the frame header
        "half.jpg": whole_jpeg[: len(whole_jpeg) // 2],
        "nearly.jpg": whole_jpeg[:-200],
        "half.png": whole_png[: len(whole_png) // 2],
        "nearly.png": whole_png[:-200],
        "half.webp": whole_webp[: len(whole_webp) // 2],
        "half.bmp": encode(Image.fromarray(pixels), "BMP")[:9000],
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write `files` into `folder`, creating it and its parents; return `folder`."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """Write an uncompressed tar of the members in this order; return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def photo_folder(
    folder: Path, images: int, *, size: Callable[[int], tuple[int, int]] = lambda i: (60 + 7 * i % 50, 90 - 5 * i % 40)
) -> Path:
    """Write `images` JPEG files of several sizes into three class folders; return `folder`."""
    return write(folder, {f"{'abc'[i % 3]}/{i:03}.jpg": jpeg(photo(*size(i), seed=i)) for i in range(images)})


def open_encoded(path: Path | str) -> EncodedSource:
    """Open a source of encoded files."""
    source = open_source(str(path))
    assert isinstance(source, EncodedSource)
    return source


def names(source: EncodedSource) -> list[str]:
    """Return the name of every image in the source's order."""
    return [source.name(i) for i in range(len(source))]
