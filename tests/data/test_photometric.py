"""The photometric op against torchvision's functions on uint8 tensors: each operation alone, and all together."""

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

# No normalization: outputs are levels from 0 to 255.
LEVELS = Augmentation(image_size=64, mean=(0, 0, 0), std=(1 / 255,) * 3)
pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = 7  # 0.1 of 64, made odd
SIDES = np.full((200, 2), 64)  # image sizes
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@pytest.fixture(autouse=True)
def each_implementation(implementation: tuple[native.Implementation, str]) -> None:
    """Run every test with each implementation."""
    global IMPLEMENTATION, DEVICE
    IMPLEMENTATION, DEVICE = implementation


IMPLEMENTATION: native.Implementation = "auto"
DEVICE = "cpu"


def photometric(crops: Tensor, params: ViewParams, recipe: Augmentation, dtype: torch.dtype = torch.float32) -> Tensor:
    """Run the implementation under test; the result is on the CPU."""
    return module.photometric(crops.to(DEVICE), params, recipe, dtype, IMPLEMENTATION).cpu()


def crops() -> Tensor:
    """Return (B, 64, 64, 3): photos and numerical edge cases."""
    y, x = np.mgrid[0:64, 0:64]
    rng = np.random.default_rng(0)
    checkers = ((x + y) % 2 * 255)[:, :, None]
    each = [
        *(photo(64, 64, seed) for seed in range(3)),
        np.full((64, 64, 3), 0),
        np.full((64, 64, 3), 255),
        np.full((64, 64, 3), (255, 0, 0)),  # hue 0, and a neighbor across the wrap-around of the hue circle
        np.full((64, 64, 3), (255, 0, 1)),
        np.full((64, 64, 3), (12, 200, 77)),
        checkers.repeat(3, axis=2),  # 1-pixel checkerboard: only the highest frequency
        checkers * (1, 0, 1),
        photo(64, 64, 7).mean(2, keepdims=True).repeat(3, axis=2),  # gray: no hue, no saturation
        np.stack([x * 4, y * 4, (x + y) * 2], axis=2),  # gradients: every level
        rng.integers(0, 256, (64, 64, 3)),  # noise
        rng.integers(0, 2, (64, 64, 3)) * 255,  # corners of the color cube: ties between channels
        rng.integers(0, 3, (64, 64, 3)),  # nearly black
    ]
    return torch.from_numpy(np.stack(each).astype(np.uint8))


CROPS = crops()


def identity_params(images: int, **changes: object) -> ViewParams:
    """Return params that leave the colors unchanged, except for `changes`."""
    params = np.zeros(images, VIEW_PARAMS)
    params["box"] = (0, 0, 64, 64)
    params["order"] = range(4)
    params["factors"] = (1, 1, 1, 0)
    for field, value in changes.items():
        params[field] = value
    return params


def levels(params: ViewParams, crops: Tensor = CROPS, augmentation: Augmentation = LEVELS) -> Tensor:
    """Return the op's result (B, H, W, 3) in levels, after checking that they are integers."""
    out = photometric(crops, params, augmentation).permute(0, 2, 3, 1)
    assert (out - out.round()).abs().max() < 1e-3
    return out.round()


def by_torchvision(apply: Callable[[Tensor], Tensor], crops: Tensor = CROPS) -> Tensor:
    """Apply a torchvision function image by image to planar uint8 tensors."""
    out = [apply(crop.permute(2, 0, 1).contiguous()) for crop in crops]
    assert all(image.dtype == torch.uint8 for image in out)
    return torch.stack([image.expand(3, -1, -1) for image in out]).permute(0, 2, 3, 1).float()


def assert_within_one_level(got: Tensor, expected: Tensor) -> None:
    off = (got - expected).abs().amax((1, 2, 3))
    assert off.max() <= 1, f"levels off, by image: {off.tolist()}"


def test_identity_params_keep_the_pixels() -> None:
    assert torch.equal(levels(identity_params(len(CROPS))), CROPS.float())
    # Jitter with identity factors goes through float: at most one level off.
    assert_within_one_level(levels(identity_params(len(CROPS), jitter=True)), CROPS.float())


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.999, 1.0, 1.3, 1.8])
@pytest.mark.parametrize(
    ("operation", "apply"),
    [(BRIGHTNESS, TF.adjust_brightness), (CONTRAST, TF.adjust_contrast), (SATURATION, TF.adjust_saturation)],
)
def test_single_jitter_factor(operation: int, apply: Callable[[Tensor, float], Tensor], factor: float) -> None:
    params = identity_params(len(CROPS), jitter=True)
    params["factors"][:, operation] = factor
    assert_within_one_level(levels(params), by_torchvision(lambda image: apply(image, factor)))


@pytest.mark.parametrize("hue_shift", [-0.5, -0.2, -1e-3, 0.05, 1 / 6, 1 / 3, 0.5])
def test_hue(hue_shift: float) -> None:
    params = identity_params(len(CROPS), jitter=True)
    params["factors"][:, HUE] = hue_shift
    got, expected = levels(params), by_torchvision(lambda image: TF.adjust_hue(image, hue_shift))
    # At sextant boundaries, torchvision's float32 hue may round into the next sextant: still within one level.
    assert_within_one_level(got, expected)


def test_grayscale() -> None:
    params = identity_params(len(CROPS), grayscale=True)
    got = levels(params)
    assert_within_one_level(got, by_torchvision(lambda image: TF.rgb_to_grayscale(image, num_output_channels=3)))
    assert (got == got[..., :1]).all()


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur(sigma: float) -> None:
    params = identity_params(len(CROPS), sigma=sigma)
    assert_within_one_level(
        levels(params), by_torchvision(lambda image: TF.gaussian_blur(image, [WINDOW] * 2, [sigma] * 2))
    )


def test_solarize() -> None:
    expected = by_torchvision(lambda image: TF.solarize(image, 128))
    assert torch.equal(levels(identity_params(len(CROPS), solarize=True)), expected)


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
def test_implementations_agree(change: dict[str, object]) -> None:
    params = identity_params(len(CROPS), **change)
    oracle = module.photometric(CROPS, params, LEVELS, implementation="pytorch").permute(0, 2, 3, 1)
    assert_within_one_level(levels(params), oracle.round())


@pytest.mark.parametrize(
    ("size", "fraction", "window", "sigma"),
    [
        (224, 0.1, 23, 40.0),
        (32, 0.1, 3, 40.0),
        (96, 0.1, 9, 40.0),
        (64, 1.0, 65, 40.0),  # beyond the CUDA kernel's maximum radius
        (64, 1.0, 65, 2.0),  # within it, since the Gaussian ends before the window
    ],
)
def test_blur_window_is_the_kernel_fraction_rounded_to_odd(
    size: int, fraction: float, window: int, sigma: float
) -> None:
    # With this sigma the window is almost uniform: two more taps would change the levels beyond its ends by 1 or more.
    augmentation = replace(LEVELS, image_size=size, blur_kernel=fraction)
    lines = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    lines[0, size // 2, :] = lines[1, :, size // 2] = 255
    got = levels(identity_params(2, sigma=sigma), lines, augmentation)
    assert_within_one_level(
        got, by_torchvision(lambda image: TF.gaussian_blur(image, [window] * 2, [sigma] * 2), lines)
    )


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


def reference(image: Tensor, params: ViewParams) -> Tensor:
    """Apply the whole recipe to one image (3, H, W) with torchvision's functions."""
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    if params["jitter"][0]:
        for operation in params["order"][0]:
            image = operations[operation](image, float(params["factors"][0, operation]))
    if params["grayscale"][0]:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if params["sigma"][0] > 0:
        image = TF.gaussian_blur(image, [WINDOW] * 2, [float(params["sigma"][0])] * 2)
    return TF.solarize(image, 128) if params["solarize"][0] else image


@pytest.mark.slow
def test_all_operations_with_the_same_params() -> None:
    images = 192  # all 24 orders occur, with and without grayscale and blur
    crops = torch.from_numpy(np.stack([photo(64, 64, seed) for seed in range(images)]))
    recipe = replace(LEVELS, solarize_prob=0.2)
    params = sample_params(recipe, 1, 2, np.arange(images), 0, SIDES[:images])
    assert len(np.unique(params["order"], axis=0)) == 24
    expected = torch.stack(
        [reference(crop.permute(2, 0, 1), params[i : i + 1]) for i, crop in enumerate(crops)]
    ).permute(0, 2, 3, 1)
    off = (levels(params, crops) - expected).abs()
    assert off.mean() <= 0.5
    # Per image, since one wrong order of 24 would not show in the overall mean.
    assert off.mean((1, 2, 3)).max() <= 1.5
    # Other params exceed the bounds.
    assert (
        levels(sample_params(LEVELS, 1, 3, np.arange(images), 0, SIDES[:images]), crops) - expected
    ).abs().mean() > 10


def test_rows_are_independent() -> None:
    # 40: two full chunks of 16 and a partial one.
    crops = torch.from_numpy(np.stack([photo(64, 64, seed) for seed in range(40)]))
    params = sample_params(LEVELS, 1, 2, np.arange(40), 0, SIDES[:40])
    whole = levels(params, crops)
    for i in (0, 15, 16, 39):
        assert torch.equal(levels(params[i : i + 1], crops[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalized_and_channels_last(dtype: torch.dtype) -> None:
    augmentation = Augmentation(image_size=64)
    before = CROPS.clone()
    out = photometric(CROPS, identity_params(len(CROPS)), augmentation, dtype)
    assert torch.equal(CROPS, before), "the input is not modified"
    assert out.dtype == dtype
    assert out.shape == (len(CROPS), 3, 64, 64)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = TF.normalize(CROPS.permute(0, 3, 1, 2).double() / 255, list(augmentation.mean), list(augmentation.std))
    assert torch.allclose(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_single_image_and_empty_batch() -> None:
    assert photometric(CROPS[:1], identity_params(1), LEVELS).is_contiguous(memory_format=torch.channels_last)
    assert photometric(CROPS[:0], identity_params(0), LEVELS).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 40), (37, 5)])  # no multiples of the vector or tile sizes
def test_other_dtypes_round_the_float32_result(dtype: torch.dtype, height: int, width: int) -> None:
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, height, width, 3)).astype(np.uint8))
    augmentation = Augmentation(image_size=64)
    params = sample_params(augmentation, 0, 0, np.arange(9), 0, SIDES[:9])
    expected = photometric(crops, params, augmentation)
    got = photometric(crops, params, augmentation, dtype)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_result_does_not_depend_on_threads() -> None:
    params = sample_params(LEVELS, 0, 0, np.arange(len(CROPS)), 0, SIDES[: len(CROPS)])
    one = photometric(CROPS, params, LEVELS)
    torch.set_num_threads(3)  # reset by the fixture one_thread
    torch.testing.assert_close(photometric(CROPS, params, LEVELS), one, rtol=0, atol=1e-3)
