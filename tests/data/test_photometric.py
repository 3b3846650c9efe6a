"""The photometric op against torchvision's functions on uint8 tensors: each change alone, and the whole recipe."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import photo
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from fastsimclr import Augmentation
from fastsimclr.data import native
from fastsimclr.data import photometric as module
from fastsimclr.data.params import VIEW_PARAMS, ViewParams, sample_params

# Levels come out as they are: neither mean nor standard deviation.
LEVELS = Augmentation(image_size=64, mean=(0, 0, 0), std=(1 / 255,) * 3)
pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = 7  # 0.1 of 64, made odd
SIDES = np.full((200, 2), 64)  # of the images that draws are made for
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@pytest.fixture(autouse=True)
def each(implementation: tuple[native.Implementation, str]) -> None:
    """Every test is of all."""
    global BACKEND, DEVICE
    BACKEND, DEVICE = implementation


BACKEND: native.Implementation = "auto"
DEVICE = "cpu"


def photometric(crops: Tensor, params: ViewParams, recipe: Augmentation, dtype: torch.dtype = torch.float32) -> Tensor:
    """By the implementation under test; the result is on the CPU."""
    return module.photometric(crops.to(DEVICE), params, recipe, dtype, BACKEND).cpu()


def crops() -> Tensor:
    """(B, 64, 64, 3): photographs, and what arithmetic stumbles over."""
    y, x = np.mgrid[0:64, 0:64]
    rng = np.random.default_rng(0)
    checkers = ((x + y) % 2 * 255)[:, :, None]
    each = [
        *(photo(64, 64, seed) for seed in range(3)),
        np.full((64, 64, 3), 0),
        np.full((64, 64, 3), 255),
        np.full((64, 64, 3), (255, 0, 0)),  # hue 0, and its neighbours on both sides of the circle's seam
        np.full((64, 64, 3), (255, 0, 1)),
        np.full((64, 64, 3), (12, 200, 77)),
        checkers.repeat(3, axis=2),  # 1-pixel checkerboard: nothing but the highest frequency
        checkers * (1, 0, 1),
        photo(64, 64, 7).mean(2, keepdims=True).repeat(3, axis=2),  # grey: no hue, no saturation
        np.stack([x * 4, y * 4, (x + y) * 2], axis=2),  # gradients: every level
        rng.integers(0, 256, (64, 64, 3)),  # noise
        rng.integers(0, 2, (64, 64, 3)) * 255,  # corners of the colour cube: ties of largest and smallest
        rng.integers(0, 3, (64, 64, 3)),  # nearly black
    ]
    return torch.from_numpy(np.stack(each).astype(np.uint8))


CROPS = crops()


def nothing(images: int, **changes: object) -> ViewParams:
    """Draws that leave the colours alone, but for `changes`."""
    params = np.zeros(images, VIEW_PARAMS)
    params["box"] = (0, 0, 64, 64)
    params["order"] = range(4)
    params["factors"] = (1, 1, 1, 0)
    for field, value in changes.items():
        params[field] = value
    return params


def levels(params: ViewParams, crops: Tensor = CROPS, augmentation: Augmentation = LEVELS) -> Tensor:
    """(B, H, W, 3): the op's result in levels, that must be whole ones."""
    out = photometric(crops, params, augmentation).permute(0, 2, 3, 1)
    assert (out - out.round()).abs().max() < 1e-3
    return out.round()


def by_torchvision(apply: Callable[[Tensor], Tensor], crops: Tensor = CROPS) -> Tensor:
    """Image by image on planar uint8 tensors."""
    out = [apply(crop.permute(2, 0, 1).contiguous()) for crop in crops]
    assert all(image.dtype == torch.uint8 for image in out)
    return torch.stack([image.expand(3, -1, -1) for image in out]).permute(0, 2, 3, 1).float()


def expect_within_a_level(got: Tensor, expected: Tensor) -> None:
    off = (got - expected).abs().amax((1, 2, 3))
    assert off.max() <= 1, f"levels off, by image: {off.tolist()}"


def test_without_changes_the_pixels_stay() -> None:
    assert torch.equal(levels(nothing(len(CROPS))), CROPS.float())
    # Jitter by factors of 1 and 0 goes through float: at most a level.
    expect_within_a_level(levels(nothing(len(CROPS), jitter=True)), CROPS.float())


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.999, 1.0, 1.3, 1.8])
@pytest.mark.parametrize(
    ("operation", "apply"),
    [(BRIGHTNESS, TF.adjust_brightness), (CONTRAST, TF.adjust_contrast), (SATURATION, TF.adjust_saturation)],
)
def test_one_factor_alone(operation: int, apply: Callable[[Tensor, float], Tensor], factor: float) -> None:
    params = nothing(len(CROPS), jitter=True)
    params["factors"][:, operation] = factor
    expect_within_a_level(levels(params), by_torchvision(lambda image: apply(image, factor)))


@pytest.mark.parametrize("hue_shift", [-0.5, -0.2, -1e-3, 0.05, 1 / 6, 1 / 3, 0.5])
def test_hue_alone(hue_shift: float) -> None:
    params = nothing(len(CROPS), jitter=True)
    params["factors"][:, HUE] = hue_shift
    got, expected = levels(params), by_torchvision(lambda image: TF.adjust_hue(image, hue_shift))
    # At the seams between sixths torchvision's hue, rounded in float32, may fall into the next: a level all the same.
    expect_within_a_level(got, expected)


def test_grey_alone() -> None:
    params = nothing(len(CROPS), grayscale=True)
    got = levels(params)
    expect_within_a_level(got, by_torchvision(lambda image: TF.rgb_to_grayscale(image, num_output_channels=3)))
    assert (got == got[..., :1]).all()


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_alone(sigma: float) -> None:
    params = nothing(len(CROPS), sigma=sigma)
    expect_within_a_level(
        levels(params), by_torchvision(lambda image: TF.gaussian_blur(image, [WINDOW] * 2, [sigma] * 2))
    )


def test_solarize_alone() -> None:
    expected = by_torchvision(lambda image: TF.solarize(image, 128))
    assert torch.equal(levels(nothing(len(CROPS), solarize=True)), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"jitter": True, "factors": (1.3, 1, 1, 0)},
        {"jitter": True, "factors": (1, 0.2, 1, 0)},
        {"jitter": True, "factors": (1, 1.8, 1, 0)},
        {"jitter": True, "factors": (1, 1, 1.8, 0)},
        {"jitter": True, "factors": (1, 1, 1, 0.05)},
        {"jitter": True, "factors": (1, 1, 1, -0.2)},
        {"grayscale": True},
        {"sigma": 0.5},
        {"sigma": 2.0},
        {"solarize": True},
    ],
    ids=str,
)
def test_implementations_equal_each_other_change_by_change(change: dict[str, object]) -> None:
    params = nothing(len(CROPS), **change)
    oracle = module.photometric(CROPS, params, LEVELS, implementation="pytorch").permute(0, 2, 3, 1)
    expect_within_a_level(levels(params), oracle.round())


@pytest.mark.parametrize(
    ("size", "fraction", "window", "sigma"),
    [
        (224, 0.1, 23, 40.0),
        (32, 0.1, 3, 40.0),
        (96, 0.1, 9, 40.0),
        (64, 1.0, 65, 40.0),  # further than the CUDA kernel reaches
        (64, 1.0, 65, 2.0),  # which it does where the Gaussian ends before the window
    ],
)
def test_the_blurs_window_is_the_recipes_fraction_made_odd(
    size: int, fraction: float, window: int, sigma: float
) -> None:
    # So wide a blur spreads a line evenly over the window, where two more taps are a level or more beyond its ends.
    augmentation = replace(LEVELS, image_size=size, blur_kernel=fraction)
    lines = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    lines[0, size // 2, :] = lines[1, :, size // 2] = 255
    got = levels(nothing(2, sigma=sigma), lines, augmentation)
    expect_within_a_level(got, by_torchvision(lambda image: TF.gaussian_blur(image, [window] * 2, [sigma] * 2), lines))


def test_views_smaller_than_the_window() -> None:
    for size in (1, 2, 3):
        augmentation = replace(LEVELS, image_size=size, blur_kernel=1.0)
        crop = CROPS[:, :size, :size].contiguous()
        out = levels(
            sample_params(replace(augmentation, blur_prob=1.0), 0, 0, np.arange(len(crop)), 0, SIDES[: len(crop)]),
            crop,
            augmentation,
        )
        assert out.shape == crop.shape
        assert ((out >= 0) & (out <= 255)).all()


def one_by_one(image: Tensor, params: ViewParams) -> Tensor:
    """The recipe in torchvision's functions, for one image (3, H, W) and its draws."""
    changes = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    if params["jitter"][0]:
        for operation in params["order"][0]:
            image = changes[operation](image, float(params["factors"][0, operation]))
    if params["grayscale"][0]:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if params["sigma"][0] > 0:
        image = TF.gaussian_blur(image, [WINDOW] * 2, [float(params["sigma"][0])] * 2)
    return TF.solarize(image, 128) if params["solarize"][0] else image


def test_the_whole_recipe_at_the_same_draws() -> None:
    images = 192  # all 24 orders occur, with and without grey and blur
    crops = torch.from_numpy(np.stack([photo(64, 64, seed) for seed in range(images)]))
    recipe = replace(LEVELS, solarize_prob=0.2)
    params = sample_params(recipe, 1, 2, np.arange(images), 0, SIDES[:images])
    assert len(np.unique(params["order"], axis=0)) == 24
    expected = torch.stack(
        [one_by_one(crop.permute(2, 0, 1), params[i : i + 1]) for i, crop in enumerate(crops)]
    ).permute(0, 2, 3, 1)
    off = (levels(params, crops) - expected).abs()
    assert off.mean() <= 0.5
    # An image's mean tells more than the whole's: a wrong order in one of 24 would hide there.
    assert off.mean((1, 2, 3)).max() <= 1.5
    # And the bound can fail: other draws are far away.
    assert (
        levels(sample_params(LEVELS, 1, 3, np.arange(images), 0, SIDES[:images]), crops) - expected
    ).abs().mean() > 10


def test_a_row_depends_on_its_own_draws_alone() -> None:
    # 40: two whole chunks of 16 and a part of one.
    crops = torch.from_numpy(np.stack([photo(64, 64, seed) for seed in range(40)]))
    params = sample_params(LEVELS, 1, 2, np.arange(40), 0, SIDES[:40])
    whole = levels(params, crops)
    for i in (0, 15, 16, 39):
        assert torch.equal(levels(params[i : i + 1], crops[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_in_channels_last(dtype: torch.dtype) -> None:
    augmentation = Augmentation(image_size=64)
    before = CROPS.clone()
    out = photometric(CROPS, nothing(len(CROPS)), augmentation, dtype)
    assert torch.equal(CROPS, before), "the crops are left as they were"
    assert out.dtype == dtype
    assert out.shape == (len(CROPS), 3, 64, 64)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = TF.normalize(CROPS.permute(0, 3, 1, 2).double() / 255, list(augmentation.mean), list(augmentation.std))
    assert torch.allclose(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_single_image_and_none() -> None:
    assert photometric(CROPS[:1], nothing(1), LEVELS).is_contiguous(memory_format=torch.channels_last)
    assert photometric(CROPS[:0], nothing(0), LEVELS).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 40), (37, 5)])  # nothing a multiple of what is done at once
def test_other_dtypes_are_the_float32_result_rounded(dtype: torch.dtype, height: int, width: int) -> None:
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, height, width, 3)).astype(np.uint8))
    augmentation = Augmentation(image_size=64)
    params = sample_params(augmentation, 0, 0, np.arange(9), 0, SIDES[:9])
    expected = photometric(crops, params, augmentation)
    got = photometric(crops, params, augmentation, dtype)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_threads_change_nothing() -> None:
    params = sample_params(LEVELS, 0, 0, np.arange(len(CROPS)), 0, SIDES[: len(CROPS)])
    one = photometric(CROPS, params, LEVELS)
    torch.set_num_threads(3)  # the fixture one_thread sets it back
    torch.testing.assert_close(photometric(CROPS, params, LEVELS), one, rtol=0, atol=1e-3)
