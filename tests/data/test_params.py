"""Sampled parameters of views: the generator against published test vectors, dependencies, and distributions."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, chisquare, ks_2samp, kstest
from torchvision.transforms.v2 import RandomResizedCrop

from fastsimclr import Augmentation
from fastsimclr.data import native
from fastsimclr.data.params import VIEW_PARAMS, ViewParams, epoch_order, philox, sample_params, sample_params_in_numpy

VIEWS = Augmentation()
MANY = 20_000
INDEX = np.arange(MANY)
SIZES = np.full((MANY, 2), (375, 500))
MIN_P_VALUE = 1e-4  # the seeds are fixed: a test that passes once always passes


@pytest.fixture(autouse=True, params=["compiled", "numpy"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with both implementations."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "is_compiled", lambda device: False)
    elif not native.is_compiled(torch.device("cpu")):
        pytest.skip("the extension is not built")


def test_philox_matches_published_test_vectors() -> None:
    # kat_vectors of Random123, philox4x32 10. Counter: (block, view, index low, index high); key: (seed, epoch).
    ones = 0xFFFFFFFF
    zeros = philox(0, 0, np.array([0]), 0, blocks=[0])[0, 0]
    assert [f"{word:08x}" for word in zeros] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    # The other two vectors have counters that are never used here: they validate the reference of the next test.
    full = _philox_reference((ones, ones, ones, ones), (ones, ones))
    assert [f"{word:08x}" for word in full] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = _philox_reference((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    assert [f"{word:08x}" for word in pi] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def _philox_reference(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 in Python integers, as in the paper; validated by the published test vectors above."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize("index", [0, 5, 0xFFFFFFFF, 1 << 32, (3 << 32) + 7, -1])
def test_philox_counter_and_key(index: int) -> None:
    seed, epoch, view = 0xDEADBEEF, 0xFFFFFFFF, 0xFFFFFFFF  # mostly ones, to detect wrong carries
    words = philox(seed, epoch, np.array([index]), view, blocks=range(13))[0]
    for block in range(13):
        expected = _philox_reference((block, view, index & 0xFFFFFFFF, index >> 32 & 0xFFFFFFFF), (seed, epoch))
        assert words[block].tolist() == expected


def test_params_depend_only_on_seed_epoch_image_and_view() -> None:
    whole = sample_params(VIEWS, 3, 7, INDEX[:100], 0, SIZES[:100])
    order = np.random.default_rng(0).permutation(100)
    permuted = sample_params(VIEWS, 3, 7, order, 0, SIZES[:100])
    assert np.array_equal(permuted, whole[order])
    for part in (slice(0, 1), slice(37, 52)):
        assert np.array_equal(sample_params(VIEWS, 3, 7, INDEX[:100][part], 0, SIZES[:100][part]), whole[part])
    twice = sample_params(VIEWS, 3, 7, np.array([5, 5]), 0, SIZES[:2])
    assert twice[0] == twice[1]
    for other in (
        sample_params(VIEWS, 4, 7, INDEX[:100], 0, SIZES[:100]),
        sample_params(VIEWS, 3, 8, INDEX[:100], 0, SIZES[:100]),
        sample_params(VIEWS, 3, 7, INDEX[:100], 1, SIZES[:100]),
    ):
        assert not (other["factors"] == whole["factors"]).all(axis=1).any()
        assert (other["box"] != whole["box"]).any(axis=1).mean() > 0.95
    assert len({row.tobytes() for row in whole["factors"]}) == 100, "each image has its own"
    assert len({row.tobytes() for row in whole["box"]}) > 95


def test_implementations_sample_the_same_params() -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, 1 << 40, MANY)
    sizes = np.exp(rng.uniform(0, np.log(3000), (MANY, 2))).astype(np.int64)
    extreme = replace(VIEWS, ratio=(0.2, 5.0), scale=(1e-4, 1.0), solarize_prob=0.3, saturation=1.7)
    for recipe in (VIEWS, extreme, VIEWS.for_evaluation()):
        sampled = sample_params(recipe, 0xDEADBEEF, 1 << 33, index, 0, sizes)
        expected = sample_params_in_numpy(recipe, 0xDEADBEEF, 1 << 33, index, 0, sizes)
        for field in VIEW_PARAMS.fields or ():
            assert np.array_equal(sampled[field], expected[field]), field


def test_per_view_recipes() -> None:
    augmentation = replace(
        VIEWS, per_view=({"blur_prob": 1.0}, {"blur_prob": 0.0, "solarize_prob": 1.0, "scale": (0.01, 0.02)})
    )
    first, second = (sample_params(augmentation, 1, 0, INDEX[:100], view, SIZES[:100]) for view in range(2))
    assert (first["sigma"] > 0).all()
    assert not first["solarize"].any()
    assert not second["sigma"].any()
    assert second["solarize"].all()
    assert second["box"][:, 2:].prod(1).max() <= 0.025 * 375 * 500


def test_probabilities_match_the_recipe() -> None:
    recipe = replace(VIEWS, flip_prob=0.3, jitter_prob=0.8, grayscale_prob=0.2, blur_prob=0.6, solarize_prob=0.4)
    params = sample_params(recipe, 1, 0, INDEX, 0, SIZES)
    each = [
        (params["flip"], 0.3),
        (params["jitter"], 0.8),
        (params["grayscale"], 0.2),
        (params["sigma"] > 0, 0.6),
        (params["solarize"], 0.4),
    ]
    for got, p in each:
        assert binomtest(int(got.sum()), MANY, p).pvalue > MIN_P_VALUE
    # Independent: each pair occurs with the product of the probabilities.
    for (a, p), (b, q) in itertools.combinations(each, 2):
        assert binomtest(int((a & b).sum()), MANY, p * q).pvalue > MIN_P_VALUE


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_probabilities_of_zero_and_one(p: float) -> None:
    params = sample_params(
        replace(VIEWS, flip_prob=p, jitter_prob=p, grayscale_prob=p, blur_prob=p, solarize_prob=p),
        1,
        0,
        INDEX,
        0,
        SIZES,
    )
    for got in (params["flip"], params["jitter"], params["grayscale"], params["sigma"] > 0, params["solarize"]):
        assert got.all() if p else not got.any()


def test_factors_and_sigma_are_uniform() -> None:
    params = sample_params(
        replace(VIEWS, brightness=0.8, contrast=0.4, saturation=1.5, hue=0.2, blur_prob=1.0), 1, 0, INDEX, 0, SIZES
    )
    ranges = [(0.2, 1.8), (0.6, 1.4), (0.0, 2.5), (-0.2, 0.2)]  # saturation is clamped at 0
    for column, (low, high) in zip([*params["factors"].T, params["sigma"]], [*ranges, (0.1, 2.0)], strict=True):
        assert low <= column.min()
        assert column.max() <= np.float32(high)
        assert kstest(column, "uniform", (low, high - low)).pvalue > MIN_P_VALUE


def test_orders_of_color_operations_are_uniform() -> None:
    order = sample_params(VIEWS, 1, 0, INDEX, 0, SIZES)["order"]
    assert (np.sort(order, axis=1) == np.arange(4)).all()
    found, count = np.unique(order, axis=0, return_counts=True)
    assert len(found) == 24
    assert chisquare(count).pvalue > MIN_P_VALUE


def crops(augmentation: Augmentation, height: int, width: int, seed: int = 1) -> NDArray[np.int64]:
    return sample_params(augmentation, seed, 0, INDEX, 0, np.full((MANY, 2), (height, width)))["box"]


def by_torchvision(augmentation: Augmentation, height: int, width: int) -> NDArray[np.int64]:
    crop = RandomResizedCrop(augmentation.image_size, scale=augmentation.scale, ratio=augmentation.ratio)
    image = torch.empty(3, height, width, dtype=torch.uint8)
    torch.manual_seed(0)
    sampled = (crop.make_params([image]) for _ in range(MANY))
    return np.array([[p["top"], p["left"], p["height"], p["width"]] for p in sampled])


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (375, 500),  # as in ImageNet
        (32, 32),  # as in CIFAR: rounding to pixels matters
        (500, 333),
        (20, 2000),  # most attempts do not fit, so many crops are the fallback
        (2000, 20),
        (3, 5),  # some attempts have no pixels
        (1, 1),
        (1, 300),
    ],
)
@pytest.mark.slow
def test_crops_have_the_distribution_of_torchvision(height: int, width: int) -> None:
    ours, theirs = crops(VIEWS, height, width), by_torchvision(VIEWS, height, width)
    for kind, (a, b) in enumerate(zip(ours.T, theirs.T, strict=True)):
        assert ks_2samp(a, b).pvalue > MIN_P_VALUE, ["top", "left", "height", "width"][kind]
    for name, of in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 3] / box[:, 2],
        "right": lambda box: box[:, 1] + box[:, 3],
    }.items():
        assert ks_2samp(of(ours), of(theirs)).pvalue > MIN_P_VALUE, name


@pytest.mark.parametrize("recipe", [VIEWS, replace(VIEWS, ratio=(0.2, 5.0), scale=(1e-4, 1.0)), VIEWS.for_evaluation()])
def test_crops_are_inside_the_image(recipe: Augmentation) -> None:
    rng = np.random.default_rng(0)
    # Sides from 1 to 3,000, log-uniform; and 65,536, whose square overflows 32 bits.
    sides = np.exp(rng.uniform(0, np.log(3000), (2, MANY))).astype(np.int64)
    sides[:, :10] = 65_536
    height, width = sides
    top, left, h, w = sample_params(recipe, 2, 0, INDEX, 0, sides.T)["box"].T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.minimum(h, w) >= 1).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()


@pytest.mark.parametrize("sample", [sample_params, sample_params_in_numpy])
def test_crops_of_images_of_one_pixel_have_one_pixel(sample: Callable[..., ViewParams]) -> None:
    recipe = replace(VIEWS, ratio=(3.0, 4.0))  # no such crop fits into the image
    box = sample(recipe, 0, 0, np.arange(2), 0, np.array([[1, 1], [70, 1]]))["box"]
    assert (box == [[0, 0, 1, 1], [34, 0, 1, 1]]).all()


def test_center_crops_are_centered_squares() -> None:
    augmentation = VIEWS.for_evaluation()
    box = sample_params(augmentation, 0, 0, INDEX[:3], 0, np.array([[100, 200], [1, 7], [333, 332]]))["box"]
    assert box.tolist() == [[6, 56, 88, 88], [0, 3, 1, 1], [21, 21, 290, 290]]


def test_scale_and_ratio_of_one_give_the_whole_image() -> None:
    augmentation = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert (crops(augmentation, 64, 64) == [0, 0, 64, 64]).all()


def test_each_epoch_has_its_own_permutation() -> None:
    orders = [epoch_order(seed, epoch, 1000) for seed in range(3) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    for a, b in itertools.combinations(orders, 2):
        # Random permutations of 1,000 agree in one position on average.
        assert (a == b).sum() < 10
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15
    assert np.array_equal(epoch_order(1, 2, 1000), epoch_order(1, 2, 1000))
    assert epoch_order(0, 0, 0).tolist() == []
    assert epoch_order(0, 0, 1).tolist() == [0]
    # Pinned: the same on every machine and in every release, so that runs can be resumed.
    assert epoch_order(0, 0, 12).tolist() == [5, 6, 3, 9, 11, 1, 4, 0, 10, 7, 2, 8]


def test_epoch_order_is_uniform() -> None:
    orders = np.array([epoch_order(seed, 0, 8) for seed in range(4000)])
    for column in orders.T:
        assert chisquare(np.bincount(column, minlength=8)).pvalue > MIN_P_VALUE
