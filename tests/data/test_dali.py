"""The DALI loader: images that DALI does not decode, or not as the others, are decoded for it."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encode, exif, jpeg, photo
from PIL import Image

from fastsimclr import Augmentation
from fastsimclr.data import Batch, open_views

SMALL = Augmentation(image_size=24)
pytestmark = pytest.mark.usefixtures("one_thread")


def with_stray_byte(file: bytes) -> bytes:
    """Insert a byte between two segments of a JPEG. libjpeg skips it; DALI refuses the file."""
    at = file.index(b"\xff\xdb")  # the first quantization table
    return file[:at] + b"\x01" + file[at:]


def load(folder: Path, backend: str, epochs: int = 2, batch_size: int = 5, workers: int = 1) -> list[Batch]:
    loader = open_views(str(folder), SMALL, batch_size, backend=backend, workers=workers, seed=3)
    batches = [batch for _ in range(epochs) for batch in loader]
    loader.close()
    return batches


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.index, b.index)
        assert all(map(torch.equal, a.views, b.views))


@pytest.mark.parametrize("damaged", [{7}, {0, 1, 2, 3, 4}, {2, 9, 16, 22}, set(range(23))])
@pytest.mark.parametrize("batch_size", [5, 23])
def test_images_that_dali_refuses_are_decoded_for_it(tmp_path: Path, damaged: set[int], batch_size: int) -> None:
    for folder in ("whole", "damaged"):
        (tmp_path / folder).mkdir()
        for i in range(23):
            file = jpeg(photo(40 + i, 60, i))
            is_damaged = folder == "damaged" and i in damaged
            (tmp_path / folder / f"{i:02}.jpg").write_bytes(with_stray_byte(file) if is_damaged else file)
    expected = load(tmp_path / "whole", "dali", batch_size=batch_size)
    assert_same(load(tmp_path / "damaged", "dali", batch_size=batch_size, workers=2), expected)


def test_refused_images_in_an_abandoned_epoch(tmp_path: Path) -> None:
    for i in range(23):
        file = jpeg(photo(40 + i, 60, i))
        (tmp_path / f"{i:02}.jpg").write_bytes(with_stray_byte(file) if i % 3 == 0 else file)
    expected = load(tmp_path, "dali")
    loader = open_views(str(tmp_path), SMALL, 5, backend="dali", workers=1, seed=3)
    assert_same(list(itertools.islice(loader, 1)), expected[:1])
    loader.set_epoch(1)  # the images of the abandoned epoch are still in the pipeline
    assert_same(list(loader), expected[5:])
    loader.close()


def test_images_that_became_smaller_are_cropped_by_their_new_size(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(photo(300, 300, i)))
    checked = open_views(str(tmp_path), SMALL, 4, backend="dali", workers=1)
    checked.source.sizes = np.full((8, 2), 300, np.int32)
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(photo(20, 30, i)))
    unchecked = open_views(str(tmp_path), SMALL, 4, backend="dali", workers=1)
    assert_same(list(checked), list(unchecked))
    for loader in (checked, unchecked):
        loader.close()


def test_orientation_is_that_of_the_header_in_every_loader(tmp_path: Path) -> None:
    pixels = photo(64, 96)
    turned = jpeg(pixels, exif=exif(6))
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x/>"
    as_long = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x04\0\0\0\x01\0\0\0\x06\0\0\0\0"
    files = {
        "exif.jpg": turned,
        "exif after xmp.jpg": turned[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + turned[2:],
        "long.jpg": jpeg(pixels, exif=as_long),
        "nine.jpg": jpeg(pixels, exif=exif(9)),
        "not exif.jpg": turned.replace(b"Exif\0", b"Exis\0"),
        "exif.png": encode(Image.fromarray(pixels), "PNG", exif=exif(6)),
    }
    upright = {name: "nine" in name or "not" in name for name in files}
    plain = Augmentation(image_size=32, crop="center", flip_prob=0, jitter_prob=0, grayscale_prob=0, blur_prob=0)
    for name, file in files.items():
        views = []
        for kind, data in (("as is", file), ("turned", jpeg(pixels if upright[name] else np.rot90(pixels, -1)))):
            folder = tmp_path / name / kind
            folder.mkdir(parents=True)
            (folder / name).write_bytes(data)
            for backend in ("torchvision", "dali"):
                loader = open_views(str(folder), plain, 1, backend=backend, workers=int(backend == "dali"))
                views.append(next(iter(loader)).views[0])
                loader.close()
        for view in views[1:]:
            assert (view - views[0]).abs().mean() < 0.03, name  # two levels of 255: another chroma grid if turned


MUTATIONS = """
import io, sys
from pathlib import Path
import numpy as np
from PIL import Image
from fastsimclr import Augmentation
from fastsimclr.data import open_views
sys.path.insert(0, sys.argv[2])
from pictures import encode, jpeg, photo

rng, folder, count = np.random.default_rng(0), Path(sys.argv[1]), int(sys.argv[3])
picture = photo(70, 90)
image = Image.fromarray(picture)
whole = {
    "jpg": [jpeg(picture), jpeg(picture, progressive=True), jpeg(picture, quality=70, subsampling="4:2:0")],
    "png": [encode(image, "PNG"), encode(image.quantize(32), "PNG")],
    "webp": [encode(image, "WEBP", quality=80), encode(image, "WEBP", lossless=True)],
}
for i in range(count):
    kind = ("jpg", "jpg", "png", "webp")[i % 4]
    file = bytearray(whole[kind][i // 4 % len(whole[kind])])
    in_header = kind == "jpg" and i % 4 == 0  # where faults corrupted the memory of DALI's parser
    at = int(rng.integers(2, file.index(bytes([0xFF, 0xDA])) if in_header else len(file)))
    match i // 4 % 5:
        case 0:
            file[at] ^= 1 << int(rng.integers(8))
        case 1:
            file[at:at] = rng.integers(0, 256, rng.integers(1, 20), dtype=np.uint8).tobytes()
        case 2:
            del file[at : at + int(rng.integers(1, 50))]
        case 3:
            file[at : at + 8] = bytes(8)
        case 4:
            del file[at:]
    Path(folder, f"{i:03}.{kind}").write_bytes(file)

loader = open_views(str(folder), Augmentation(image_size=16), 20, backend="dali", workers=2, max_bad=1)
used = []
for batch in loader:
    used += batch.index.tolist()
assert len(used) == count
assert not set(used) & set(loader.bad)
assert set(range(count)) == set(used) | set(loader.bad)
assert all(loader.bad.values())  # the reasons
print("good", count - len(loader.bad))
"""


@pytest.mark.slow
def test_mutated_files_are_decoded_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    program = [sys.executable, "-c", MUTATIONS, str(tmp_path / "images"), str(Path(__file__).parents[1]), "600"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    good = int(done.stdout.split()[-1])
    assert 150 < good < 500  # most flips leave a JPEG readable, most damages no PNG
