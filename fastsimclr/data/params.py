"""Random parameters of views and order of images, from the counter-based generator Philox4x32-10.

Reference: Salmon et al., SC 2011. The parameters are a function of (seed, epoch, image, view) only. They do not depend
on the backend, the batch size, the rank, the worker or where a run was resumed, and there is no state to save.

The compiled extension samples them (csrc/view_params.cpp). The numpy implementation replaces it if it is not available,
and tests compare against it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsimclr.data import native
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.pixels import MAX_CHANNELS

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_CHOICES, _FACTORS, _OTHERS, _ATTEMPTS = 0, 1, 2, 3  # counter blocks of four numbers; from _ATTEMPTS one per attempt
_ORIENTATION, _DROP, _GAINS = 16, 17, 18  # likewise; drawn only for recipes with these operations; four of _GAINS
_CHUNK = 1 << 14  # images whose sort keys are drawn at once, in the CPU's cache
_CPU = torch.device("cpu")
_WORD = 0xFFFFFFFF
_EPOCH_ORDER, REPLACEMENT = 1 << 20, (1 << 20) + 1  # in place of the view's number: other draws for an image
_PERMUTATIONS = np.array(
    [[a, b, c, d] for a in range(4) for b in range(4) for c in range(4) for d in range(4) if len({a, b, c, d}) == 4]
)


# Sampled parameters of one view of one image; same layout as struct ViewParams of csrc/view_params.h.
VIEW_PARAMS = np.dtype(
    [
        ("box", np.int32, 4),  # top, left, height, width of the crop, in pixels of the image
        ("factors", np.float32, 4),  # brightness, contrast, saturation; hue shift
        ("sigma", np.float32),  # of the blur, in pixels of the view; 0 for no blur
        ("gain", np.float32, MAX_CHANNELS),  # factor of each channel; 1 for no gain
        ("order", np.uint8, 4),  # of the jitter: 0 brightness, 1 contrast, 2 saturation, 3 hue
        ("flip", np.bool_),
        ("jitter", np.bool_),
        ("grayscale", np.bool_),
        ("solarize", np.bool_),
        ("vertical_flip", np.bool_),
        ("quarter_turns", np.uint8),  # counterclockwise, after the flips
        ("dropped", np.uint16),  # the channel that is dropped, from 1; 0 for none
    ]
)
ViewParams = NDArray[np.void]  # (B,) of VIEW_PARAMS


def sample_batch_params(
    augmentation: Augmentation, seed: int, epoch: int, index: NDArray[np.int64], sizes: NDArray[np.int64]
) -> list[ViewParams]:
    """Sample the parameters of every view of the images `index` (B,) of heights and widths `sizes` (B, 2).

    Returns one array (B,) of VIEW_PARAMS per view.
    """
    return [sample_params(augmentation, seed, epoch, index, view, sizes) for view in range(augmentation.num_views)]


def sample_params(
    augmentation: Augmentation, seed: int, epoch: int, index: NDArray[np.int64], view: int, sizes: NDArray[np.int64]
) -> ViewParams:
    """Sample the parameters (B,) of view number `view` of the images `index` (B,); sizes (B, 2): height and width."""
    recipe = augmentation.recipes[view]
    if not native.is_compiled(_CPU):
        return sample_params_in_numpy(recipe, seed, epoch, index, view, sizes)
    index, sizes = (np.ascontiguousarray(array, dtype=np.int64) for array in (index, sizes))
    out = np.empty(len(index), VIEW_PARAMS)
    native.call(
        "sample_params",
        **_ranges(recipe),
        seed=seed & _WORD,
        epoch=epoch & _WORD,
        view=view,
        count=len(index),
        index=index.ctypes.data,
        sizes=sizes.ctypes.data,
        out=out.ctypes.data,
    )
    return out


@functools.lru_cache(maxsize=64)  # workers sample image by image
def _ranges(recipe: Augmentation) -> dict[str, Any]:
    """Return the recipe as arguments of csrc/view_params.h."""
    low, high = _factor_ranges(recipe)
    return {
        "center_fraction": recipe.center_fraction if recipe.crop == "center" else 0.0,
        "scale": recipe.scale,
        "ratio": recipe.ratio,
        "log_ratio": np.log(recipe.ratio).tolist(),
        "factors_low": low.tolist(),
        "factors_high": high.tolist(),
        "sigma": recipe.blur_sigma,
        "probabilities": [
            recipe.flip_prob,
            recipe.jitter_prob,
            recipe.grayscale_prob,
            recipe.blur_prob,
            recipe.solarize_prob,
            recipe.vertical_flip_prob,
            recipe.rotate90_prob,
            recipe.channel_drop_prob,
        ],
        "gain": _gain_range(recipe),
        "channels": recipe.channels,
    }


def sample_params_in_numpy(
    recipe: Augmentation, seed: int, epoch: int, index: NDArray[np.int64], view: int, sizes: NDArray[np.int64]
) -> ViewParams:
    """Compute `sample_params` in numpy, a hundred times slower for single images. recipe: the recipe of this view."""
    u = _uniform(seed, epoch, index, view, range(_ATTEMPTS))  # (B, blocks, 4)
    flip, jitter, grayscale, blur = (u[:, _CHOICES, k] for k in range(4))
    order, sigma, solarize = (u[:, _OTHERS, k] for k in range(3))
    low, high = _factor_ranges(recipe)
    sigma_low, sigma_high = recipe.blur_sigma
    out = np.empty(len(index), VIEW_PARAMS)
    if recipe.crop == "center":
        out["box"] = _center_boxes(recipe, sizes)
    else:
        out["box"] = _random_boxes(
            recipe, sizes, lambda rows, k: _uniform(seed, epoch, index[rows], view, [_ATTEMPTS + k])[:, 0]
        )
    out["flip"] = flip < recipe.flip_prob
    out["jitter"] = jitter < recipe.jitter_prob
    out["order"] = _PERMUTATIONS[(order * len(_PERMUTATIONS)).astype(np.int64)]
    out["factors"] = low + (high - low) * u[:, _FACTORS]
    out["grayscale"] = grayscale < recipe.grayscale_prob
    out["sigma"] = np.where(blur < recipe.blur_prob, sigma_low + (sigma_high - sigma_low) * sigma, 0.0)
    out["solarize"] = solarize < recipe.solarize_prob
    out["vertical_flip"], out["quarter_turns"], out["dropped"], out["gain"] = False, 0, 0, 1
    if recipe.vertical_flip_prob > 0 or recipe.rotate90_prob > 0:
        vertical_flip, rotate, turns = _uniform(seed, epoch, index, view, [_ORIENTATION])[:, 0, :3].T
        out["vertical_flip"] = vertical_flip < recipe.vertical_flip_prob
        out["quarter_turns"] = np.where(rotate < recipe.rotate90_prob, 1 + (turns * 3).astype(np.int64), 0)
    if recipe.channel_drop_prob > 0:
        drop, channel = _uniform(seed, epoch, index, view, [_DROP])[:, 0, :2].T
        out["dropped"] = np.where(drop < recipe.channel_drop_prob, 1 + (channel * recipe.channels).astype(np.int64), 0)
    if recipe.gain > 0:
        least, most = _gain_range(recipe)
        gains = _uniform(seed, epoch, index, view, range(_GAINS, _GAINS + MAX_CHANNELS // 4))
        out["gain"] = least + (most - least) * gains.reshape(len(index), MAX_CHANNELS)
    return out


def _gain_range(recipe: Augmentation) -> tuple[float, float]:
    """Return the lowest and the highest gain."""
    return max(0.0, 1 - recipe.gain), 1 + recipe.gain


def _factor_ranges(recipe: Augmentation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the lowest and the highest brightness, contrast and saturation factors and hue shift, (4,) each."""
    strength = np.array([recipe.brightness, recipe.contrast, recipe.saturation])
    return np.append(np.maximum(0, 1 - strength), -recipe.hue), np.append(1 + strength, recipe.hue)


def _center_boxes(augmentation: Augmentation, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the boxes (B, 4) of the central squares, with sides of `center_fraction` of the shorter side."""
    side = np.maximum(1, np.rint(sizes.min(1) * augmentation.center_fraction)).astype(np.int64)[:, None]
    return np.concatenate([(sizes - side) // 2, side, side], axis=1)


def _random_boxes(
    augmentation: Augmentation,
    sizes: NDArray[np.int64],
    attempt: Callable[[NDArray[np.int64], int], NDArray[np.float64]],
) -> NDArray[np.int64]:
    """Sample boxes (B, 4) from the distribution of torchvision's RandomResizedCrop.

    A box is the first of ten attempts that fits, else the largest central crop with an aspect ratio in the range.
    attempt(rows, k) -> (len(rows), 4): uniform numbers in [0, 1) for area, aspect ratio, top and left.
    """
    box = _largest_boxes(augmentation, sizes)
    pending = np.arange(len(sizes))  # rows without a box that fits
    log_low, log_high = np.log(augmentation.ratio)
    for k in range(CROP_ATTEMPTS):
        if len(pending) == 0:
            break
        size = sizes[pending]
        u_area, u_aspect, u_top, u_left = attempt(pending, k).T
        area = size.prod(1) * (augmentation.scale[0] + (augmentation.scale[1] - augmentation.scale[0]) * u_area)
        aspect = np.exp(log_low + (log_high - log_low) * u_aspect)
        sides = np.rint(np.sqrt(np.stack([area / aspect, area * aspect], axis=1))).astype(np.int64)  # height, width
        fits = ((sides > 0) & (sides <= size)).all(1)
        corner = (np.stack([u_top, u_left], axis=1) * (size - sides + 1)).astype(np.int64)
        box[pending[fits]] = np.concatenate([corner, sides], axis=1)[fits]
        pending = pending[~fits]
    return box


def _largest_boxes(augmentation: Augmentation, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the boxes (B, 4) of the largest central crops with an aspect ratio in the range, of at least one pixel."""
    height, width = sizes.T
    narrow, wide = augmentation.ratio
    h = np.where(width / height < narrow, np.rint(width / narrow).clip(1), height).astype(np.int64)
    w = np.where(width / height > wide, np.rint(height * wide).clip(1), width).astype(np.int64)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)


def epoch_order(seed: int, epoch: int, images: int) -> NDArray[np.int64]:
    """Return a permutation of 0 to images - 1, determined by seed and epoch."""
    keys = np.empty(images, np.uint64)
    for first in range(0, images, _CHUNK):
        index = np.arange(first, min(first + _CHUNK, images))
        words = philox(seed, epoch, index, _EPOCH_ORDER, blocks=[0])[:, 0]
        keys[index] = words[:, 0] << np.uint64(32) | words[:, 1]
    return np.argsort(keys, kind="stable")


def _uniform(seed: int, epoch: int, index: NDArray[np.int64], view: int, blocks: Sequence[int]) -> NDArray[np.float64]:
    """Return (B, blocks, 4) numbers in [0, 1), multiples of 2^-24, which are exact in float32."""
    return (philox(seed, epoch, index, view, blocks) >> np.uint64(8)).astype(np.float64) * 2.0**-24


def philox(seed: int, epoch: int, index: NDArray[np.int64], view: int, blocks: Sequence[int]) -> NDArray[np.uint64]:
    """Return 32-bit words (B, blocks, 4) as uint64. Key: (seed, epoch); counter: (block, view, low, high index)."""
    low32, shift = np.uint64(_WORD), np.uint64(32)
    wide = index.astype(np.uint64)[:, None]
    block = np.array(blocks, dtype=np.uint64)[None, :]
    shape = (len(index), len(blocks))
    c0, c1 = np.broadcast_to(block, shape), np.full(shape, view, dtype=np.uint64)
    c2, c3 = np.broadcast_to(wide & low32, shape), np.broadcast_to(wide >> shift, shape)
    k0, k1 = seed & _WORD, epoch & _WORD
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & low32,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & low32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return np.stack([c0, c1, c2, c3], axis=2)
