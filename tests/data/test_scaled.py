"""Large JPEGs, decoded at a fraction of their size: the same draws and nearly the same views as from a full decode."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from pictures import encode, exif, jpeg, photo
from PIL import Image
from torch import Tensor

from fastsimclr import Augmentation
from fastsimclr.data import open_views
from fastsimclr.data.headers import read_header
from fastsimclr.data.images import decode
from fastsimclr.data.params import sample_batch_params
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.scaled import MIN_PIXELS, ScaledImage, crop_exactly, decode_scaled
from fastsimclr.data.torchvision import crop
from fastsimclr.errors import UserError

HEIGHT, WIDTH = 1401, 1609  # above MIN_PIXELS, and one pixel more than a multiple of 8, the most that a turn can shift
CROPS = Augmentation(image_size=64, jitter_prob=0, grayscale_prob=0, blur_prob=0)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def large() -> np.ndarray:
    return photo(HEIGHT, WIDTH)


def scaled(file: bytes, augmentation: Augmentation = CROPS, seed: int = 0) -> tuple[ScaledImage | None, list[Tensor]]:
    """Return the scaled image, and the absolute differences of its crops from those of a full decode."""
    data = np.frombuffer(file, np.uint8).copy()
    header = read_header(data, "large")
    params = sample_batch_params(augmentation, seed, 0, np.zeros(1, np.int64), np.array([header.upright_size]))
    image = decode_scaled(data, header, augmentation, params)
    if image is None:
        return None, []
    full = decode(data, "large")
    return image, [
        (crop_exactly(image.image, recipe, box, each["flip"][0]).float() - crop(full, recipe, each).float()).abs()
        for recipe, box, each in zip(augmentation.recipes, image.boxes, params, strict=True)
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_views_are_those_of_a_full_decode(large: np.ndarray, orientation: int) -> None:
    file = jpeg(large, quality=90, exif=exif(orientation))
    for seed in range(2):
        image, differences = scaled(file, seed=seed)
        assert image is not None
        for difference in differences:
            assert difference.mean() < 0.5  # at most 0.37; more than 0.8 without the shift of turned images


def test_factor_is_the_largest_that_leaves_crops_as_large_as_their_views(large: np.ndarray) -> None:
    file = jpeg(large, quality=90)
    for side, factor in ((350, 4), (351, 2), (700, 2), (701, 1), (1401, 1), (2000, 1)):
        whole = Augmentation(image_size=side, crop="center", center_fraction=1.0, num_views=1)
        image, _ = scaled(file, whole)
        assert (factor == 1) == (image is None)
        if image is not None:
            assert image.image.shape == (3, -(-HEIGHT // factor), -(-WIDTH // factor))
    # The most demanding of all views decides.
    image, _ = scaled(file, Augmentation(image_size=32, per_view=({"image_size": 701, "scale": (1.0, 1.0)}, {})))
    assert image is None


def test_files_that_pillow_converts_differently_are_decoded_in_full(large: np.ndarray) -> None:
    gray, differences = scaled(encode(Image.fromarray(large).convert("L"), "JPEG"))
    assert gray is not None
    assert max(each.mean() for each in differences) < 0.5
    assert scaled(encode(Image.fromarray(large).convert("CMYK"), "JPEG"))[0] is None


def views(folder: Path, backend: str, scaled_decode: Literal["auto", "off"]) -> Tensor:
    pixels = PixelOptions(scaled_decode=scaled_decode)
    loader = open_views(str(folder), CROPS, 1, backend=backend, workers=int(backend == "dali"), pixels=pixels, seed=2)
    batches = [torch.cat(batch.views) for batch in loader]
    loader.close()
    return torch.cat(batches)


def test_loaders_agree_and_the_option_turns_it_off(tmp_path: Path, large: np.ndarray) -> None:
    Image.fromarray(large).save(tmp_path / "a.jpg", quality=90)
    Image.fromarray(np.rot90(large)).save(tmp_path / "b.jpg", quality=90, exif=exif(6))
    in_full, by_torchvision, by_dali = (
        views(tmp_path, *options) for options in (("torchvision", "off"), ("torchvision", "auto"), ("dali", "auto"))
    )
    std = torch.tensor(CROPS.std).view(3, 1, 1) * 255
    for other in (in_full, by_dali):
        difference = (by_torchvision - other).abs() * std
        assert 0 < difference.mean() < 0.5


@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_smaller_photographs_are_decoded_in_full(tmp_path: Path, backend: str, large: np.ndarray) -> None:
    small = large[: MIN_PIXELS // WIDTH]
    for name, pixels in (("a", small), ("b", photo(400, 500))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg")
    assert torch.equal(views(tmp_path, backend, "auto"), views(tmp_path, backend, "off"))


@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_damaged_file_is_named(tmp_path: Path, backend: str, large: np.ndarray) -> None:
    whole = jpeg(large, quality=90)
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.jpg: got \d+ bytes that do not decode"):
        views(tmp_path, backend, "auto")
