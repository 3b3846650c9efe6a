"""Every random choice of the data path, from a counter-based generator: Philox4x32-10 (Salmon et al., SC 2011).

A draw is a function of (seed, epoch, image, view) and of nothing else: not of the loader, the batch size, the rank,
the worker, or where a run was resumed. Nothing has a state, so there is nothing to save.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsimclr.views import Views

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_CHOICES, _FACTORS, _ORDER, _ATTEMPTS = 0, 1, 2, 3  # counter blocks of four numbers each
_BLOCKS = _ATTEMPTS + CROP_ATTEMPTS
_EPOCH_ORDER = 1 << 20  # a "view" that no view has: the order of the images
_PERMUTATIONS = np.array(
    [[a, b, c, d] for a in range(4) for b in range(4) for c in range(4) for d in range(4) if len({a, b, c, d}) == 4]
)


class Draws(NamedTuple):
    """What was drawn for one view of each of B images."""

    attempts: NDArray[np.float64]  # (B, 10, 4): area, aspect, top, left of each attempt at a crop, in [0, 1)
    flip: NDArray[np.bool_]  # (B,)
    jitter: NDArray[np.bool_]  # (B,)
    order: NDArray[np.int64]  # (B, 4): 0 brightness, 1 contrast, 2 saturation, 3 hue, in the order of application
    factors: NDArray[np.float64]  # (B, 4): of the same four
    grey: NDArray[np.bool_]  # (B,)
    sigma: NDArray[np.float64]  # (B,): of the blur in pixels; 0 for none

    def part(self, rows: slice) -> "Draws":
        """The draws of some of the images."""
        return Draws(*(field[rows] for field in self))  # type: ignore[arg-type]  # each field keeps its dtype


def draw(views: Views, seed: int, epoch: int, index: NDArray[np.int64], view: int) -> Draws:
    """Draws for view `view` of the images `index` (B,)."""
    u = _uniform(seed, epoch, index, view, _BLOCKS)  # (B, blocks, 4)
    flip, jitter, grey, blur = (u[:, _CHOICES, k] for k in range(4))
    low = np.array([max(0.0, 1 - views.brightness), max(0.0, 1 - views.contrast), max(0.0, 1 - views.saturation)])
    high = 1 + np.array([views.brightness, views.contrast, views.saturation])
    low, high = np.append(low, -views.hue), np.append(high, views.hue)
    sigma_low, sigma_high = views.blur_sigma
    sigma = sigma_low + (sigma_high - sigma_low) * u[:, _ORDER, 1]
    return Draws(
        attempts=u[:, _ATTEMPTS:],
        flip=flip < views.flip,
        jitter=jitter < views.jitter,
        order=_PERMUTATIONS[(u[:, _ORDER, 0] * len(_PERMUTATIONS)).astype(np.int64)],
        factors=low + (high - low) * u[:, _FACTORS],
        grey=grey < views.grey,
        sigma=np.where(blur < views.blur, sigma, 0.0),
    )


def boxes(views: Views, draws: Draws, height: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.int64]:
    """Crops (B, 4) as top, left, height, width in pixels, of images of the given heights and widths (B,).

    The distribution of torchvision's RandomResizedCrop: the first of ten attempts that fits, else the largest central
    crop whose aspect ratio is allowed. For `crop="center"`: the central square.
    """
    if views.crop == "center":
        side = np.maximum(1, np.rint(np.minimum(height, width) * views.center_fraction)).astype(np.int64)
        return np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=1)

    u_area, u_aspect, u_top, u_left = np.moveaxis(draws.attempts, 2, 0)  # (B, 10) each
    area = (height * width)[:, None] * (views.scale[0] + (views.scale[1] - views.scale[0]) * u_area)
    log_low, log_high = np.log(views.ratio)
    aspect = np.exp(log_low + (log_high - log_low) * u_aspect)
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.argmax(axis=1)
    row = np.arange(len(first))
    w, h, u_top, u_left = w[row, first], h[row, first], u_top[row, first], u_left[row, first]

    whole = width / height
    fallback_w = np.where(whole > views.ratio[1], np.rint(height * views.ratio[1]), width).astype(np.int64)
    fallback_h = np.where(whole < views.ratio[0], np.rint(width / views.ratio[0]), height).astype(np.int64)
    found = fits.any(axis=1)
    w, h = np.where(found, w, fallback_w), np.where(found, h, fallback_h)
    top = np.where(found, (u_top * (height - h + 1)).astype(np.int64), (height - h) // 2)
    left = np.where(found, (u_left * (width - w + 1)).astype(np.int64), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1)


def epoch_order(seed: int, epoch: int, images: int) -> NDArray[np.int64]:
    """A permutation of 0 … images - 1, by seed and epoch."""
    keys = _philox(seed, epoch, np.arange(images), _EPOCH_ORDER, blocks=1)[:, 0]  # (images, 4) of uint32
    return np.argsort(keys[:, 0] << np.uint64(32) | keys[:, 1], kind="stable")


def _uniform(seed: int, epoch: int, index: NDArray[np.int64], view: int, blocks: int) -> NDArray[np.float64]:
    """(B, blocks, 4) numbers in [0, 1), multiples of 2^-24 as a float32 holds them exactly."""
    return (_philox(seed, epoch, index, view, blocks) >> np.uint64(8)).astype(np.float64) * 2.0**-24


def _philox(seed: int, epoch: int, index: NDArray[np.int64], view: int, blocks: int) -> NDArray[np.uint64]:
    """(B, blocks, 4) words of 32 bits, in uint64. Key: (seed, epoch); counter: (block, view, index low, index high)."""
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    wide = index.astype(np.uint64)[:, None]
    block = np.arange(blocks, dtype=np.uint64)[None, :]
    shape = (len(index), blocks)
    c0, c1 = np.broadcast_to(block, shape), np.full(shape, view, dtype=np.uint64)
    c2, c3 = np.broadcast_to(wide & low32, shape), np.broadcast_to(wide >> shift, shape)
    k0, k1 = seed & 0xFFFFFFFF, epoch & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & low32,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & low32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=2)
