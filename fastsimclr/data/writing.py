"""Write a source as tar shards of about equal size, which any number of processes may do and resume.

    DIR/shard-000000.tar …   000000000.jpg, 000000000.cls, …: keys are positions in the source, labels are integers
    DIR/classes.txt          the names of the classes, a line for each label, if the source has names
    DIR/index.npz            where the images lie: opening the shards reads no header
    DIR/manifest.json        the shards with their images, bytes and SHA-256, and the images that were skipped

Encoded images keep their bytes, unless they are to be resized; decoded ones become PNG, or .npy if they are not 8-bit
gray or RGB. What a shard holds depends on the source and the options alone, so a shard that is complete is kept.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from fastsimclr.data.headers import open_by_pillow, read_header
from fastsimclr.data.images import EXTENSIONS
from fastsimclr.data.opening import open_source
from fastsimclr.data.sources import NO_LABEL, DecodedSource, EncodedSource, Source
from fastsimclr.data.tar_index import INDEX_FILE, save_index, stamps_of
from fastsimclr.data.tar_labels import CLASSES_FILE
from fastsimclr.data.tars import read_local_shards
from fastsimclr.data.workers import WorkerLoader
from fastsimclr.errors import UserError
from fastsimclr.progress_bar import print_line, progress_bar
from fastsimclr.run_folder import check_output, replace_atomically

MANIFEST = "manifest.json"
JPEG_QUALITY = 95
_SAMPLED = 64  # images whose mean size gives the number of images in a shard
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes
_LISTED = 10  # skipped images that are printed
_GRAY = ("1", "L", "LA")


@dataclass(frozen=True)
class Shard:
    """A shard that is complete. skipped: name and reason of each image that could not be read or resized."""

    name: str
    images: int
    bytes: int
    sha256: str
    skipped: list[tuple[str, str]]


@dataclass
class Manifest:
    """What a folder of shards holds. plan: hash of the source and the options. shards: the complete ones by number."""

    plan: str
    count: int
    classes: int
    shards: dict[int, Shard] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return len(self.shards) == self.count

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards.values())

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return [image for number in sorted(self.shards) for image in self.shards[number].skipped]

    def save(self, folder: Path) -> None:
        about = {"images": self.images, "classes": self.classes, "complete": self.is_complete, "plan": self.plan}
        shards = {number: dataclasses.asdict(self.shards[number]) for number in sorted(self.shards)}
        with replace_atomically(folder / MANIFEST) as partial:
            partial.write_text(json.dumps({**about, "count": self.count, "shards": shards}, indent=1) + "\n")

    @staticmethod
    def load(folder: Path) -> "Manifest | None":
        """Return the manifest of a folder, None if it has none. Raises UserError if it is damaged."""
        try:
            text = (folder / MANIFEST).read_text()
        except FileNotFoundError:
            return None
        try:
            about = json.loads(text)
            shards = {int(number): Shard(**shard) for number, shard in about["shards"].items()}
            return Manifest(about["plan"], about["count"], about["classes"], shards)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / MANIFEST}: got a damaged manifest; expected one of fastsimclr shard") from error


def shard(data: str, folder: Path, *, resize: int | None, shard_mb: int, workers: int) -> str:
    """Open images and write them to shards; return the summary line to print."""
    check_output(folder / MANIFEST, True)
    source = open_source(data)
    for note in source.notes:
        print_line(f"{data}: {note}")
    manifest = write_shards(source, folder, resize=resize, shard_mb=shard_mb, workers=workers)
    for name, reason in manifest.skipped[:_LISTED]:
        print_line(f"skipped {name}: {reason}")
    skipped = f", {len(manifest.skipped):,} skipped (see {folder / MANIFEST})" if manifest.skipped else ""
    return (
        f"{folder}: {manifest.images:,} images of {manifest.classes:,} classes in {manifest.count:,} shards{skipped}; "
        f"train with --data.train '{folder}/*.tar'"
    )


def write_shards(source: Source, folder: Path, *, resize: int | None, shard_mb: int, workers: int) -> Manifest:
    """Write the images of a source to tar shards in `folder`, or those that are missing there.

    resize: shorter side in pixels of larger images. shard_mb: approximate size of a shard. workers: processes; 0 writes
    in this one. Raises UserError if the folder holds anything else, or no image can be used.
    """
    images = _Images(source, resize)
    mean = images.mean_bytes()
    count = max(1, min(len(source), round(len(source) * mean / (shard_mb * 1e6))))
    plan = hashlib.sha256(source.digest() + f"{len(source)} {mean} {count} {resize}".encode()).hexdigest()
    manifest = Manifest.load(folder)
    if manifest is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--output: got {folder}, which has files in it, expected a new folder")
        manifest = Manifest(plan, count, len(source.classes))
    elif manifest.plan != plan:
        raise UserError(f"--output: got {folder}, which has shards of other images or options, expected a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    if source.classes and any(source.class_name(n) != str(n) for n in np.unique(source.labels) if n != NO_LABEL):
        lines = "".join(f"{' '.join(name.splitlines())}\n" for name in source.classes)
        (folder / CLASSES_FILE).write_text(lines, encoding="utf-8", errors="surrogateescape")
    manifest.save(folder)
    bounds = np.linspace(0, len(source), count + 1).astype(int).tolist()
    missing = [n for n in range(count) if n not in manifest.shards or not (folder / manifest.shards[n].name).exists()]
    loader = WorkerLoader(_Writer(images, folder, bounds), missing, min(workers, len(missing)), pin_memory=False)
    progress = progress_bar(len(source), "Shards", "image")
    progress.update(sum(bounds[n + 1] - bounds[n] for n in set(range(count)) - set(missing)))
    try:
        for number, shard in zip(missing, loader, strict=True):
            if isinstance(shard, UserError):
                raise shard
            manifest.shards[number] = shard
            manifest.save(folder)
            progress.update(bounds[number + 1] - bounds[number])
    finally:
        progress.close()
        loader.close()
    if not manifest.images:
        raise UserError(f"data: got no image that can be used; {manifest.skipped[0][1]}")
    _write_index(folder, manifest)
    return manifest


def _write_index(folder: Path, manifest: Manifest) -> None:
    files = [str(folder / manifest.shards[number].name) for number in range(manifest.count)]
    classes = folder / CLASSES_FILE
    stamps = stamps_of([*files, *([str(classes)] if classes.exists() else [])])
    save_index(folder / INDEX_FILE, read_local_shards(files), stamps)


def verify_shards(folder: Path) -> Manifest:
    """Compare the shards in a folder with its manifest. Raises UserError at the first difference."""
    manifest = Manifest.load(folder)
    if manifest is None:
        raise UserError(f"{folder}: got no {MANIFEST} in that folder, expected one that fastsimclr shard wrote")
    if not manifest.is_complete:
        got = f"{len(manifest.shards)} of {manifest.count} shards"
        raise UserError(f"{folder}: got {got}: run fastsimclr shard again with the same options to write the others")
    expected = {shard.name for shard in manifest.shards.values()}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in expected:
            raise UserError(f"{path}: got a shard that is not in {MANIFEST}: remove it")
    shards = [manifest.shards[number] for number in sorted(manifest.shards)]
    progress = progress_bar(len(shards), "Verifying", "shard")
    with ThreadPoolExecutor(_cores()) as threads:
        try:
            for difference in threads.map(lambda shard: _difference(folder / shard.name, shard), shards):
                if difference:
                    raise UserError(f"{difference}: remove it and run fastsimclr shard again to write it anew")
                progress.update()
        finally:
            threads.shutdown(cancel_futures=True)
            progress.close()
    return manifest


def _difference(path: Path, shard: Shard) -> str:
    try:
        if path.stat().st_size != shard.bytes:
            return f"{path}: got {path.stat().st_size:,} bytes, expected {shard.bytes:,}"
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found = digest.hexdigest()
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return "" if found == shard.sha256 else f"{path}: got SHA-256 {found[:16]}…, expected {shard.sha256[:16]}…"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class _Images:
    """The images of a source as they are written."""

    def __init__(self, source: Source, resize: int | None) -> None:
        self.source, self.resize = source, resize

    def encoded(self, index: int) -> tuple[str, bytes]:
        """Return the ending and the bytes of an image. Raises UserError if it cannot be read or resized."""
        name = self.source.name(index)
        if isinstance(self.source, EncodedSource):
            data = self.source.read(index)
            ending = os.path.splitext(name)[1].lower()
            if self.resize is not None:
                header = read_header(data, name)
                header.check_pixels(self.source.max_pixels, name)
                if min(header.upright_size) > self.resize:
                    return _resized(data, self.resize, name)
            return ending if ending in EXTENSIONS else ".jpg", data.tobytes()
        assert isinstance(self.source, DecodedSource)
        image = self.source.image(index)
        if self.resize is None or min(image.shape[1:]) <= self.resize:
            return _lossless(image)
        if image.dtype != torch.uint8 or image.shape[0] not in (1, 3):
            raise UserError(f"{name}: got pixels that are not 8-bit gray or RGB, as --resize expects: leave it out")
        return ".png", _save(_scaled(_as_pillow(image), self.resize), "PNG")

    def mean_bytes(self) -> float:
        """Return the mean size of the images of an evenly spaced sample, with the headers in a tar."""
        sizes = []
        for index in np.unique(np.linspace(0, len(self.source) - 1, _SAMPLED).astype(int)).tolist():
            try:
                sizes.append(len(self.encoded(index)[1]) + 3 * tarfile.BLOCKSIZE)
            except UserError:
                continue  # a bad image: it is reported when its shard is written
        return float(np.mean(sizes)) if sizes else 1.0


class _Writer(Dataset["Shard | UserError"]):
    """Writes shard number i when its item i is read, and returns what it holds."""

    def __init__(self, images: _Images, folder: Path, bounds: list[int]) -> None:
        self._images, self._folder, self._bounds = images, folder, bounds

    def __getitem__(self, number: int) -> "Shard | UserError":
        path = self._folder / f"shard-{number:06d}.tar"
        skipped: list[tuple[str, str]] = []
        source, written = self._images.source, 0
        try:
            with replace_atomically(path) as partial, partial.open("wb") as file:
                hashed = _HashedFile(file)
                with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
                    for index in range(*self._bounds[number : number + 2]):
                        try:
                            ending, data = self._images.encoded(index)
                        except UserError as error:
                            skipped.append((source.key(index), str(error)))
                            continue
                        _add(tar, f"{index:09d}{ending}", data)
                        if source.labels[index] != NO_LABEL:
                            _add(tar, f"{index:09d}.cls", b"%d" % source.labels[index])
                        written += 1
        except OSError as error:
            return UserError(f"{path}: cannot be written ({error.strerror})")
        return Shard(path.name, written, hashed.size, hashed.digest.hexdigest(), skipped)


class _HashedFile:
    """A file that is written once, from its start to its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _resized(data: NDArray[np.uint8], side: int, name: str) -> tuple[str, bytes]:
    """Return a larger image with a shorter side of `side` pixels, upright: JPEG if it was one, else PNG."""
    try:
        image = open_by_pillow(data.data)
        if image.mode not in _EIGHT_BITS:
            raise ValueError(f"mode {image.mode}, expected 8 bits: leave out --resize")
        kind = "JPEG" if image.format == "JPEG" else "PNG"
        scale = 2 * side / min(image.size)  # decoded at twice the size or more
        image.draft(None, (math.ceil(scale * image.width), math.ceil(scale * image.height)))
        upright = ImageOps.exif_transpose(image)
        small = _scaled(upright.convert("L" if image.mode in _GRAY else "RGB"), side)
    except Exception as error:  # each format raises its own types
        raise UserError(f"{name}: cannot be resized ({str(error) or type(error).__name__})") from error
    return ".jpg" if kind == "JPEG" else ".png", _save(small, kind)


def _scaled(image: Image.Image, side: int) -> Image.Image:
    scale = side / min(image.size)
    size = (max(side, round(scale * image.width)), max(side, round(scale * image.height)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _save(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=JPEG_QUALITY, compress_level=1)  # the latter for PNG
    return file.getvalue()


def _as_pillow(image: Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array))


def _lossless(image: Tensor) -> tuple[str, bytes]:
    """Return a decoded image (C, H, W) as PNG if it is 8-bit gray or RGB, else as .npy (H, W, C)."""
    if image.dtype == torch.uint8 and image.shape[0] in (1, 3):
        return ".png", _save(_as_pillow(image), "PNG")
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    return ".npy", file.getvalue()
