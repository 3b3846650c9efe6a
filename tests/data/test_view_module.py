"""The views of tensors: equal to the loader's, seeded, resumable, and different on every rank."""

import io
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pictures import photo
from torch import Tensor

from fastsimclr import Augmentation, UserError, open_views
from fastsimclr.data import open_source
from fastsimclr.data.pixels import default_format
from fastsimclr.data.sources import ArraySource

pytestmark = pytest.mark.usefixtures("one_thread")

BYOL = Augmentation(image_size=24, per_view=({"blur_prob": 1.0}, {"blur_prob": 0.1, "solarize_prob": 0.2}))
MULTI_CROP = Augmentation.multi_crop(small=2, small_size=16, image_size=24)


def images(count: int = 6, height: int = 40, width: int = 30) -> Tensor:
    """(count, 3, height, width) uint8."""
    return torch.from_numpy(np.stack([photo(height, width, seed) for seed in range(count)])).permute(0, 3, 1, 2)


def assert_same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def differ(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("augmentation", [BYOL, MULTI_CROP], ids=["byol", "multi_crop"])
def test_views_are_those_of_the_loader(augmentation: Augmentation) -> None:
    digits = open_source("digits")
    assert isinstance(digits, ArraySource)
    loader = open_views(digits.subset(np.arange(23)), augmentation, 10, backend="memory", seed=5)
    views = augmentation.as_module(seed=5)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        for batch in loader:
            pixels = digits.images[batch.index].permute(0, 3, 1, 2)
            got = views(pixels, index=batch.index, epoch=epoch)
            assert_same(got, batch.views)
            assert [view.shape[2] for view in got] == [recipe.image_size for recipe in augmentation.recipes]
            assert all(view.is_contiguous(memory_format=torch.channels_last) for view in got)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_images_of_any_channels_and_dtype_are_those_of_the_loader(dtype: torch.dtype) -> None:
    unit = torch.rand(6, 5, 40, 30, generator=torch.Generator().manual_seed(0))
    batch = unit if dtype.is_floating_point else (unit * torch.iinfo(dtype).max).to(dtype)
    recipe = replace(BYOL.without_rgb(), mean=(0.5,) * 5, std=(0.25,) * 5, rotate90_prob=0.5, channel_drop_prob=0.5)
    source = ArraySource("five", batch.permute(0, 2, 3, 1), np.full(6, -1), ())
    source.pixels = default_format(5, dtype)
    loader = open_views(source, recipe, 6, backend="memory", seed=3, shuffle=False)
    (expected,) = loader
    assert_same(recipe.as_module(seed=3)(batch, index=expected.index), expected.views)


def test_layout_and_float_dtype_of_the_images_do_not_matter() -> None:
    floats = images().float() / 255
    expected = BYOL.as_module()(floats)
    for dtype in (torch.float32, torch.float64):
        for layout in (torch.contiguous_format, torch.channels_last):
            batch = floats.to(dtype).contiguous(memory_format=layout).requires_grad_()
            got = BYOL.as_module()(batch)
            assert_same(got, expected)
            assert not any(view.requires_grad for view in got)


def test_every_call_has_new_views_and_a_resumed_module_continues() -> None:
    module, batch = BYOL.as_module(seed=1), images()
    first, second = module(batch), module(batch)
    assert differ(first, second)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    third = module(batch)
    file.seek(0)
    resumed = BYOL.as_module(seed=1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(resumed(batch), third)
    halves = BYOL.as_module(seed=1)
    parts = [halves(batch[:2]), halves(batch[2:])]
    assert_same(tuple(map(torch.cat, zip(*parts, strict=True))), first)
    assert differ(BYOL.as_module(seed=2)(batch), first)


def test_an_explicit_index_leaves_the_count_unchanged() -> None:
    module, batch = BYOL.as_module(), images()
    for index in (list(range(6)), np.arange(6), torch.arange(6)):
        assert_same(module(batch, index=index, epoch=0), BYOL.as_module()(batch))
    assert_same(module(batch), BYOL.as_module()(batch))


def test_every_rank_has_its_own_views() -> None:
    batch = images()
    by_rank = [BYOL.as_module(rank=rank)(batch) for rank in range(3)]
    assert_same(by_rank[0], BYOL.as_module()(batch))
    assert all(differ(by_rank[a], by_rank[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_autocast_does_not_change_the_views() -> None:
    batch = images()
    expected = BYOL.as_module(dtype=torch.float64)(batch)  # computed by PyTorch operations, some of them convolutions
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(BYOL.as_module(dtype=torch.float64)(batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_views_of_half_precision_are_rounded(dtype: torch.dtype) -> None:
    batch = images()
    expected = tuple(view.to(dtype) for view in BYOL.as_module()(batch))
    assert_same(BYOL.as_module(dtype=dtype)(batch), expected)


def test_threads_with_an_index_do_not_disturb_each_other() -> None:
    module, batch = BYOL.as_module(), images()
    expected = [BYOL.as_module()(batch, index=range(first, first + 6)) for first in range(8)]
    got: dict[int, Any] = {}

    def run(first: int) -> None:
        got[first] = module(batch, index=range(first, first + 6))

    threads = [threading.Thread(target=run, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, views in enumerate(expected):
        assert_same(got[first], views)


def test_a_compiled_model_with_views_has_the_same_output() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.views = BYOL.as_module()

        def forward(self, batch: Tensor) -> Tensor:
            a, b = self.views(batch)
            return a.mean() + 2 * b.mean()

    batch = images()
    expected = [model(batch) for model in [Model()] for _ in range(2)]
    compiled = torch.compile(Model(), backend="eager")
    assert [compiled(batch) for _ in range(2)] == expected


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (torch.zeros(3, 8, 8), {}, r"images: got shape \(3, 8, 8\), expected \(B, C, H, W\)"),
        (
            torch.zeros(2, 8, 8, 3),
            {},
            r"images: got shape \(2, 8, 8, 3\), expected \(B, C, H, W\) with 3 channels, the length of mean",
        ),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), {}, r"images: got torch.int64, expected uint8, uint16, or float"),
        (torch.full((2, 3, 8, 8), 255.0), {}, r"images: got floats from 255 to 255, expected \[0, 1\]: divide"),
        (torch.full((2, 3, 8, 8), torch.nan), {}, r"images: got floats from nan to nan, expected \[0, 1\]"),
        (torch.zeros(2, 3, 8, 8), {"index": [0]}, r"index: got shape \(1,\), expected \(2,\)"),
    ],
)
def test_bad_batches_are_user_errors(batch: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BYOL.as_module()(batch, **options)


def test_the_dtype_of_views_is_float() -> None:
    with pytest.raises(UserError, match=r"dtype: got torch.uint8, expected a float dtype"):
        BYOL.as_module(dtype=torch.uint8)


@pytest.mark.gpu
def test_views_on_a_gpu_are_those_of_the_cpu() -> None:
    batch = images()
    for on_cpu, on_gpu in zip(MULTI_CROP.as_module()(batch), MULTI_CROP.as_module()(batch.cuda()), strict=True):
        assert on_gpu.is_cuda
        assert (on_cpu - on_gpu.cpu()).abs().mean() < 1.5 / 255 / 0.225  # one level and a half, as between backends


def test_vertical_flips_and_quarter_turns() -> None:
    images = torch.arange(4 * 3 * 8 * 8, dtype=torch.uint8).view(4, 3, 8, 8)
    upright = Augmentation(image_size=8, num_views=1, center_fraction=1.0).for_evaluation()
    turned = replace(upright, rotate90_prob=1.0)
    for before, after in zip(upright.as_module()(images)[0], turned.as_module()(images)[0], strict=True):
        assert any(torch.equal(torch.rot90(before, turns, (1, 2)), after) for turns in (1, 2, 3))
