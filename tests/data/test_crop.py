"""Every implementation of crops from images in memory against torchvision's resized_crop on uint8 tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import photo
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from fastsimclr import Augmentation
from fastsimclr.data import native
from fastsimclr.data.crop import crop
from fastsimclr.data.params import VIEW_PARAMS, ViewParams, sample_params

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def each_implementation(implementation: tuple[native.Implementation, str]) -> None:
    """Run every test with each implementation."""
    global IMPLEMENTATION, DEVICE
    IMPLEMENTATION, DEVICE = implementation


IMPLEMENTATION: native.Implementation = "auto"
DEVICE = "cpu"


def crops(images: Tensor, index: np.ndarray, params: ViewParams, recipe: Augmentation) -> Tensor:
    return crop(images.to(DEVICE), index, params, recipe, IMPLEMENTATION).cpu()


def pictures(height: int, width: int) -> Tensor:
    """Return (6, height, width, 3): photos, noise, corners of the color cube, and a checkerboard of single pixels."""
    rng = np.random.default_rng(0)
    checkers = (np.add.outer(np.arange(height), np.arange(width)) % 2 * 255)[:, :, None].repeat(3, axis=2)
    each = [
        *(photo(height, width, seed) for seed in range(3)),
        rng.integers(0, 256, (height, width, 3)),
        rng.integers(0, 2, (height, width, 3)) * 255,  # corners: a cubic filter overshoots at each of them
        checkers,
    ]
    return torch.from_numpy(np.stack(each).astype(np.uint8))


def by_torchvision(images: Tensor, index: np.ndarray, params: ViewParams, recipe: Augmentation) -> Tensor:
    out = []
    for i, row in zip(index, params, strict=True):
        image, mode = images[int(i)].permute(2, 0, 1), InterpolationMode(recipe.interpolation)
        view = TF.resized_crop(image, *row["box"].tolist(), [recipe.image_size] * 2, mode, antialias=True)
        out.append(TF.horizontal_flip(view) if row["flip"] else view)
    return torch.stack(out).permute(0, 2, 3, 1)


def reference(images: Tensor, index: np.ndarray, params: ViewParams, recipe: Augmentation) -> tuple[Tensor, Tensor]:
    """Resample columns, round, resample rows, round, in float64.

    Returns the views and a mask of the levels that float32 may round differently, since they are close to a tie.
    """

    def weights(start: int, length: int, whole: int) -> np.ndarray:
        scale = length / recipe.image_size
        center = start + (np.arange(recipe.image_size)[:, None] + 0.5) * scale
        x = abs((np.arange(whole) + 0.5 - center) / max(1, scale))
        cubic = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        weight = cubic if recipe.interpolation == "bicubic" else np.maximum(0, 1 - x)
        weight[:, :start] = weight[:, start + length :] = 0
        return weight / weight.sum(1, keepdims=True)

    def is_tie(x: np.ndarray) -> np.ndarray:
        return abs(x - np.floor(x) - 0.5) < 1e-4

    views, ties = [], []
    for i, row in zip(index, params, strict=True):
        image, (top, left, h, w) = images[int(i)].numpy().astype(np.float64), row["box"].tolist()
        wide = np.einsum("xj,ijc->ixc", weights(left, w, image.shape[1]), image)
        rows = weights(top, h, image.shape[0])
        view = np.einsum("yi,ixc->yxc", rows, np.floor(wide + 0.5).clip(0, 255))
        tie = is_tie(view) | (np.einsum("yi,ixc->yxc", (rows != 0).astype(int), is_tie(wide).astype(int)) > 0)
        order = slice(None, None, -1 if row["flip"] else 1)
        views.append(np.floor(view + 0.5).clip(0, 255)[:, order])
        ties.append(tie[:, order])
    return torch.from_numpy(np.stack(views).astype(np.uint8)), torch.from_numpy(np.stack(ties))


def assert_close_to_reference(
    got: Tensor, images: Tensor, index: np.ndarray, params: ViewParams, recipe: Augmentation
) -> None:
    expected, tie = reference(images, index, params, recipe)
    assert torch.equal(got[~tie], expected[~tie])
    assert (got.int() - expected.int()).abs().max() <= 1
    off = (got.int() - by_torchvision(images, index, params, recipe).int()).abs()
    # torchvision uses 16-bit fixed-point weights and itself deviates this much from the reference.
    assert off.max() <= 2
    assert off.float().mean() <= 0.05
    assert (off > 1).float().mean() <= 5e-4


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (32, 32, 32),  # CIFAR-10
        (96, 96, 64),  # two tiles of the kernel; crops are enlarged and shrunk
        (40, 17, 33),  # no multiples of the tile size; one column in the second tile
        (64, 64, 7),  # shrunk by up to 9: filters of many pixels
        (5, 3, 24),
    ],
)
def test_crops_match_reference_and_torchvision(height: int, width: int, size: int, interpolation: str) -> None:
    images, recipe = pictures(height, width), Augmentation(image_size=size, interpolation=interpolation)
    index = np.arange(24) % len(images)
    params = sample_params(recipe, 1, 0, np.arange(24), 0, np.tile([height, width], (24, 1)))
    assert 0 < params["flip"].sum() < 24
    got = crops(images, index, params, recipe)
    assert got.shape == (24, size, size, 3)
    assert got.dtype == torch.uint8
    assert_close_to_reference(got, images, index, params, recipe)
    assert reference(images, index, params, recipe)[1].float().mean() < 0.5, "most levels are not excluded as ties"
    other = sample_params(recipe, 2, 0, np.arange(24), 0, np.tile([height, width], (24, 1)))
    wrong = crops(images, index, other, recipe).int() - got.int()
    assert wrong.abs().float().mean() > 5, "other parameters exceed the bound"


def test_full_image_at_its_own_size_is_unchanged() -> None:
    images, recipe = pictures(37, 37), Augmentation(image_size=37)
    params = np.zeros(len(images), VIEW_PARAMS)
    params["box"] = (0, 0, 37, 37)
    assert torch.equal(crops(images, np.arange(len(images)), params, recipe), images)
    params["flip"] = True
    assert torch.equal(crops(images, np.arange(len(images)), params, recipe), images.flip(2))


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (11, 12, 1, 1), (0, 3, 12, 1), (5, 0, 1, 13)])
def test_crops_of_a_single_pixel_or_line(box: tuple[int, int, int, int]) -> None:
    images, recipe = pictures(12, 13), Augmentation(image_size=9)
    params, index = np.zeros(len(images), VIEW_PARAMS), np.arange(len(images))
    params["box"] = box
    assert_close_to_reference(crops(images, index, params, recipe), images, index, params, recipe)


def test_empty_batch() -> None:
    assert crops(pictures(8, 8), np.arange(0), np.zeros(0, VIEW_PARAMS), Augmentation(image_size=4)).shape == (
        0,
        4,
        4,
        3,
    )


def test_result_does_not_depend_on_threads() -> None:
    images, recipe = pictures(32, 32), Augmentation(image_size=32)
    index = np.arange(len(images))
    params = sample_params(recipe, 1, 0, index, 0, np.tile([32, 32], (len(images), 1)))
    one = crops(images, index, params, recipe)
    torch.set_num_threads(3)  # reset by the fixture one_thread
    assert torch.equal(crops(images, index, params, replace(recipe)), one)
