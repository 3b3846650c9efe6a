"""Whether contenders of bench_views.py make the same views: pixel by pixel where nothing is random, else on average.

Rivals draw by themselves, so their views differ from ours pixel by pixel. Two things can be held against ours:

`pixels_apart`: the views of a few images where the recipe leaves nothing to chance: the whole image (cut to a ratio of
3/4 to 4/3), always flipped, and, if the recipe blurs, always by the same sigma. That is reading, decoding, resizing,
flipping, blurring and normalising. Our own loaders are compared at the whole recipe, as equal seeds draw equal views.

`Looks`: averages over the views of many images, of those that were timed: channels' levels, contrast, sharpness,
colourfulness, the fraction of grey views, and how far the two views of an image are apart in each. They may differ from
ours by chance, 4 standard errors, and by 3 % of their value and half a level, for other filters and roundings. A recipe
without its blur, jitter, hue's turn or grey views differs by more: `test_the_checks_notice_less_work`.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastsimclr import Views

STANDARD_ERRORS, SYSTEMATIC = 4.0, 0.03
PIXELS_BOUND = 1.5  # mean levels of 255, between two loaders of ours: tests/test_loaders.py


def without_chance(views: Views) -> Views:
    """The recipe with the same steps, none of them random; the colours' jitter, which has no such form, left out."""
    blur = {"blur": 1.0, "blur_sigma": (1.0, 1.0)} if views.blur else {}
    return replace(views, scale=(1.0, 1.0), flip=1.0, jitter=0.0, grey=0.0, **blur)


def levels(view: Tensor, views: Views) -> Tensor:
    """A view's pixels in levels of 255, float32 on the CPU, from uint8 or from normalised ones."""
    view = view.detach().cpu()
    if view.dtype == torch.uint8:
        return view.float()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (views.mean, views.std))
    return (view.float() * std + mean) * 255


def pixels_apart(some: Iterable[tuple[Tensor, ...]], others: Iterable[tuple[Tensor, ...]], views: Views) -> float:
    """Mean difference in levels of 255 of two unshuffled loaders' views. Both have to show as many."""
    total, pixels = 0.0, 0
    for left, right in itertools.zip_longest(some, others, fillvalue=()):
        for a, b in zip(left, right, strict=True):
            total += float((levels(a, views) - levels(b, views)).abs().sum())
            pixels += a.numel()
    return total / pixels


@dataclass(frozen=True)
class Looks:
    """Averages over views and pairs of views, and their standard errors."""

    mean: dict[str, float]
    error: dict[str, float]

    @classmethod
    def of(cls, loader: Iterable[tuple[Tensor, ...]], views: Views, images: int) -> "Looks":
        """From as many epochs as give `images` pairs, all of their batches."""
        pairs: list[Tensor] = []
        while sum(map(len, pairs)) < images:
            pairs += [torch.stack([features(view, views) for view in batch], 1) for batch in loader]
        each = torch.cat(pairs)  # (images, views, features)
        found = {name: each[:, :, number].flatten() for number, name in enumerate(FEATURES)}
        for number, name in enumerate(FEATURES):
            found[f"{name}, between views"] = (each[:, 0, number] - each[:, 1, number]).abs()
        # Per image, as its views have it in common: their number counts, not that of the views.
        return cls(
            {name: float(values.mean()) for name, values in found.items()},
            {name: float(values.std() / len(each) ** 0.5) for name, values in found.items()},
        )

    def apart(self, ours: "Looks") -> tuple[float, str]:
        """The largest difference as a share of what is allowed, and in what it is."""
        share = {}
        for name, expected in ours.mean.items():
            chance = (self.error[name] ** 2 + ours.error[name] ** 2) ** 0.5
            allowed = STANDARD_ERRORS * chance + SYSTEMATIC * abs(expected) + HALF_A_LEVEL[name.split(",")[0]]
            share[name] = abs(self.mean[name] - expected) / allowed
        worst = max(share, key=lambda name: share[name])
        return share[worst], worst


FEATURES = ("red", "green", "blue", "contrast", "sharpness", "colourfulness", "red less blue", "hue", "grey")
HALF_A_LEVEL = dict.fromkeys(FEATURES, 0.5) | {"sharpness": 0.01, "hue": 0.01, "grey": 0.001}  # in their units


def features(view: Tensor, views: Views) -> Tensor:
    """(B, len(FEATURES)) of views (B, 3, S, S)."""
    x = levels(view, views)
    red, green, blue = x.unbind(1)
    grey = x.mean(1)
    spread = x.amax(1) - x.amin(1)
    steps = (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean((1, 2))
    contrast = grey.flatten(1).std(1)
    return torch.stack(
        [
            *x.mean((2, 3)).unbind(1),
            contrast,
            torch.log((steps + 0.1) / (contrast + 1)),  # not by how much contrast there is, which the jitter changes
            spread.mean((1, 2)),
            (red - blue).mean((1, 2)),
            (2 * green - red - blue).mean((1, 2)) / (spread.mean((1, 2)) + 5),
            (spread.mean((1, 2)) < 2.0).float(),
        ],
        1,
    )
