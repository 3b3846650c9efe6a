"""Decoding: every file format to the same upright RGB, by `decode` and by both loaders; errors name bad files."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import broken, jpeg, kinds, photo, write
from PIL import Image, ImageOps

from fastsimclr import Augmentation
from fastsimclr.data import images, open_views
from fastsimclr.data.images import as_ppm, decode
from fastsimclr.errors import UserError

FILES = kinds()
BROKEN = broken()
# The whole central square, not normalized; bilinear, since bicubic amplifies differences between decoders.
PLAIN = Augmentation(
    image_size=40, interpolation="bilinear", center_fraction=1.0, mean=(0, 0, 0), std=(1 / 255,) * 3
).for_evaluation()


def array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).copy()


def by_pillow(data: bytes) -> NDArray[np.int64]:
    """Decode to (H, W, 3) with Pillow; the upper 8 of 16 bits."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):
        return np.repeat(np.asarray(image).astype(np.int64)[:, :, None] >> 8, 3, axis=2)
    return np.asarray(image.convert("RGB")).astype(np.int64)


@pytest.mark.parametrize("name", FILES)
def test_decode_matches_pillow(name: str) -> None:
    expected = by_pillow(FILES[name])
    image = decode(array(FILES[name]), name)
    assert image.dtype == torch.uint8
    assert image.shape == (3, *expected.shape[:2])
    difference = np.abs(image.permute(1, 2, 0).numpy() - expected)
    # Lossless formats are bit-identical. JPEG and lossy WebP are decoded by other versions of the same libraries.
    assert difference.max() <= (2 if name.endswith(".jpg") or name.startswith("lossy") else 0)


def test_decode_without_torchvision_decoders_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: decode(array(data), name) for name, data in FILES.items()}
    assert images._decode_web is not None, "this torchvision has no decoders"
    monkeypatch.setattr(images, "_decode_web", None)
    for name, data in FILES.items():
        difference = (decode(array(data), name).int() - expected[name].int()).abs()
        assert difference.max() <= (2 if name.endswith(".jpg") or name.startswith("lossy") else 0), name
    for name, data in BROKEN.items():
        with pytest.raises(UserError, match=f"^{name}: "):
            decode(array(data), name)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation(orientation: int) -> None:
    # Does not rely on Pillow's transposition: the pixels are stored rotated, tagged, and decoded upright again.
    upright = photo(45, 64, seed=5)
    undo = {
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }
    tags = Image.Exif()
    tags[0x0112] = orientation
    stored = jpeg(np.ascontiguousarray(undo[orientation](upright)), exif=tags, quality=100, subsampling=0)
    decoded = decode(array(stored), "rotated").permute(1, 2, 0).numpy().astype(int)
    assert decoded.shape == upright.shape
    assert np.abs(decoded - upright).max() <= 6  # JPEG at quality 100


def test_as_ppm_round_trips() -> None:
    image = torch.from_numpy(photo(7, 5)).permute(2, 0, 1)
    assert torch.equal(decode(as_ppm(image), "ppm"), image)


@pytest.mark.parametrize(("backend", "workers"), [("torchvision", 0), ("torchvision", 1), ("dali", 1)])
@pytest.mark.slow
def test_loaders_decode_every_format_upright(tmp_path: Path, backend: str, workers: int) -> None:
    # All 37 kinds in one folder, in batches of 8, so that a batch mixes sizes, formats and modes.
    folder = write(tmp_path, FILES)
    loader = open_views(str(folder), PLAIN, 8, backend=backend, shuffle=False, workers=workers)
    views = torch.cat([batch.views[0] for batch in loader])
    loader.close()
    assert len(views) == len(FILES)
    for view, name in zip(views, sorted(FILES), strict=True):
        expected = by_pillow(FILES[name])
        side = min(expected.shape[:2])
        top, left = ((s - side) // 2 for s in expected.shape[:2])
        square = Image.fromarray(expected[top : top + side, left : left + side].astype(np.uint8))
        expected = torch.from_numpy(np.array(square.resize((40, 40), Image.Resampling.BILINEAR))).permute(2, 0, 1)
        difference = (view - expected).abs()[:, 2:-2, 2:-2]  # at the border, DALI's filter reads beyond the crop
        assert difference.mean() <= 0.75, f"{name}: {difference.mean():.2f} levels on average"
        assert difference.max() <= 3, f"{name}: {difference.max():.0f} levels"


@pytest.mark.parametrize("name", BROKEN)
def test_decode_error_names_the_file(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: got {len(BROKEN[name])} bytes that do not decode") as caught:
        decode(array(BROKEN[name]), name)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected a complete image: remove or replace the file" in message
    assert ".cpp" not in message, "no source paths of libraries"
    assert " at 0x" not in message


def test_jpeg_truncated_at_any_length_raises() -> None:
    whole = jpeg(photo(40, 40))
    for length in [*range(0, 24), *range(24, len(whole) - 2, 61)]:  # -2: a missing end marker is accepted
        with pytest.raises(UserError, match="cut"):
            decode(array(whole[:length]), "cut")
