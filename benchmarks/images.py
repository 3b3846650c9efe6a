"""The images of the benchmarks: those in ../shared/data if present, else built-in or synthetic ones."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.suite import SMALL
from fastsimclr.data import open_source
from fastsimclr.data.memory import decode_all
from fastsimclr.data.sources import ArraySource, EncodedSource

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def small_images(count: int | None = None) -> tuple[ArraySource, str]:
    """Return the first `count` images (None: all) of CIFAR-10, or else of the digits, decoded, and the name."""
    found = (SHARED / "cifar10").is_dir() and not SMALL
    source = open_source(str(SHARED / "cifar10" / "train-{0..4}.tar") if found else "digits")
    source = source.subset(np.arange(min(count or len(source), len(source))))
    if isinstance(source, EncodedSource):
        source = decode_all(source)
    assert isinstance(source, ArraySource)
    return source, "CIFAR-10" if found else "digits"


def photographs(count: int) -> tuple[list[bytes], str]:
    """Return at most `count` JPEG files, from the archive or else synthetic, and their origin."""
    archive = SHARED / "photos" / "flowers_300.tar"
    if not archive.is_file():
        return synthetic(count), "synthetic"
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")][:count]
        return [file.read() for file in files if file is not None], archive.name


def large_photographs(count: int, size: tuple[int, int]) -> tuple[list[bytes], str]:
    """Return `count` JPEG files of `size` (width, height): photographs enlarged, with added detail."""
    rng = np.random.default_rng(0)
    width, height = size
    photos, origin = photographs(count)
    files = []
    for photo in photos:
        with Image.open(io.BytesIO(photo)) as opened:
            picture = np.array(opened.convert("RGB").resize(size, Image.Resampling.LANCZOS), np.float32)
        for scale, levels in ((8, 10), (4, 8), (2, 6), (1, 3)):  # detail of several sizes, then noise
            detail = Image.fromarray(rng.normal(0, levels, (height // scale, width // scale)).astype(np.float32))
            picture += np.asarray(detail.resize(size, Image.Resampling.BICUBIC))[..., None]
        file = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files, f"{origin}, enlarged"


def synthetic(count: int) -> list[bytes]:
    """Generate JPEG files of coarse blobs and fine noise, 500×400, of about 110 KB."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        blobs = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8))
        smooth = np.asarray(blobs.resize((500, 400), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    return files


def four_to_three(file: bytes) -> bytes:
    """Crop the center of an image to the aspect ratio 4:3, so that a crop of the whole area is the whole image.

    If no crop of the requested area and ratio fits, torchvision and fastsimclr crop the center, DALI and Kornia a
    random part.
    """
    with Image.open(io.BytesIO(file)) as opened:
        image = opened.convert("RGB")
    unit = min(image.width // 4, image.height // 3)
    left, top = (image.width - 4 * unit) // 2, (image.height - 3 * unit) // 2
    cropped = io.BytesIO()
    image.crop((left, top, left + 4 * unit, top + 3 * unit)).save(cropped, "JPEG", quality=95)
    return cropped.getvalue()
