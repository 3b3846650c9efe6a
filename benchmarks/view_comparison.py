"""How bench_views.py compares loaders: opened on the same images, timed in alternation, and checked to make the same.

Rivals draw on their own, so their views differ from ours pixel by pixel. Two things can be compared with ours:

`pixels_apart`: the views of a few images where the recipe leaves nothing to chance: the whole image (cut to a ratio of
3/4 to 4/3), always flipped, and, if the recipe blurs, always by the same sigma. That is reading, decoding, resizing,
flipping, blurring and normalizing. Our own loaders are compared at the whole recipe, as equal seeds draw equal views.

`Looks`: averages over the views of many images, of those that were timed: channels' levels, contrast, sharpness,
colorfulness, the fraction of grey views, and how far the two views of an image are apart in each. They may differ from
ours by chance, 4 standard errors, and by 3 % of their value and half a level, for other filters and roundings. A recipe
without its blur, jitter, hue's turn or grey views differs by more: `test_the_checks_notice_less_work`.
"""

import functools
import gc
import importlib
import importlib.util
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import most_mib, settle_heap, trimmed_mib
from benchmarks.suite import CORES, DEVICE, SMALL, Check, Suite, one_line
from benchmarks.view_peers import GRID, Contender, Loader, Setting
from fastsimclr import Views

STANDARD_ERRORS, SYSTEMATIC = 4.0, 0.03
PIXELS_BOUND = 1.5  # mean levels of 255, between two loaders of ours: tests/test_loaders.py
ROUNDS = 2 if SMALL else 5
LOOKED_AT = 96 if SMALL else 512  # images whose views' averages are compared
WORKERS = min(16, CORES)
FEATURES = ("red", "green", "blue", "contrast", "sharpness", "colourfulness", "red less blue", "hue", "grey")
HALF_A_LEVEL = dict.fromkeys(FEATURES, 0.5) | {"sharpness": 0.01, "hue": 0.01, "grey": 0.001}  # in their units


def without_chance(views: Views) -> Views:
    """The recipe with the same steps, none of them random; the color jitter, which has no such form, left out."""
    blur = {"blur": 1.0, "blur_sigma": (1.0, 1.0)} if views.blur else {}
    return replace(views, scale=(1.0, 1.0), flip=1.0, jitter=0.0, grey=0.0, **blur)


def levels(view: Tensor, views: Views) -> Tensor:
    """A view's pixels in levels of 255, float32 on the CPU, from uint8 or from normalized ones."""
    view = view.detach().cpu()
    if view.dtype == torch.uint8:
        return view.float()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (views.mean, views.std))
    return (view.float() * std + mean) * 255


def pixels_apart(some: Loader, others: Loader, views: Views) -> float:
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
    def of(cls, loader: Loader, views: Views, images: int = LOOKED_AT) -> "Looks":
        """From as many epochs as give `images` pairs, all of their batches."""
        pairs: list[Tensor] = []
        while sum(map(len, pairs)) < images:
            pairs += [torch.stack([features(view, views) for view in batch], 1) for batch in loader]
        each = torch.cat(pairs)  # (images, views, features)
        found = {name: each[:, :, number].flatten() for number, name in enumerate(FEATURES)}
        for number, name in enumerate(FEATURES):
            found[f"{name}, between views"] = (each[:, 0, number] - each[:, 1, number]).abs()
        # Standard errors per image, as its views have it in common: their number counts, not that of the views.
        return cls(
            {name: float(values.mean()) for name, values in found.items()},
            {name: float(values.std() / len(each) ** 0.5) for name, values in found.items()},
        )

    def apart(self, ours: "Looks") -> tuple[float, str]:
        """The largest difference as a share of what chance allows, and the name of what differs."""
        share = {}
        for name, expected in ours.mean.items():
            chance = (self.error[name] ** 2 + ours.error[name] ** 2) ** 0.5
            allowed = STANDARD_ERRORS * chance + SYSTEMATIC * abs(expected) + HALF_A_LEVEL[name.split(",")[0]]
            share[name] = abs(self.mean[name] - expected) / allowed
        worst = max(share, key=lambda name: share[name])
        return share[worst], worst


def features(view: Tensor, views: Views) -> Tensor:
    """(B, len(FEATURES)) of views (B, 3, S, S)."""
    x = levels(view, views)
    red, green, blue = x.unbind(1)
    grey = x.mean(1)
    spread = (x.amax(1) - x.amin(1)).mean((1, 2))
    steps = (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean((1, 2))
    contrast = grey.flatten(1).std(1)
    each = [
        *x.mean((2, 3)).unbind(1),
        contrast,
        torch.log((steps + 0.1) / (contrast + 1)),  # not by how much contrast there is, which the jitter changes
        spread,
        (red - blue).mean((1, 2)),
        (2 * green - red - blue).mean((1, 2)) / (spread + 5),
        (spread < 2.0).float(),
    ]
    return torch.stack(each, 1)


@dataclass(frozen=True)
class Images:
    """What contenders are opened on: an epoch, a slow contender's epoch, and a few of a ratio of 4 to 3."""

    whole: Any
    once: Any
    few: Any
    origin: str


class Comparison:
    """Contenders on the same images; the first is ours. side, dtype: of each view that a batch has to consist of."""

    def __init__(
        self, contenders: Mapping[str, Contender], setting: Setting, data: Images, side: int, dtype: torch.dtype
    ) -> None:
        self.setting, self.data, self.side, self.dtype = setting, data, side, dtype
        self.contenders: dict[str, Contender] = {}
        self.missing: dict[str, str] = {}
        self.loaders: dict[str, Loader] = {}
        self.images: dict[str, int] = {}
        self.peak_mib: dict[str, float] = {}
        for name, contender in contenders.items():
            if contender.requires and importlib.util.find_spec(contender.requires) is None:
                self.missing[name] = f"not installed (pip install {contender.requires})"
                continue
            try:
                self._open(name, contender)
            except Exception as error:
                if not contender.requires:
                    raise
                self.missing[name] = f"it does not run here: {one_line(error)}"

    def _open(self, name: str, contender: Contender) -> None:
        """Open a contender, and run an epoch to see that it works and what memory it takes."""
        if contender.requires:
            importlib.import_module(contender.requires)  # else its imports are in its memory
        before = trimmed_mib()
        data = self.data.once if contender.slow else self.data.whole
        loader, images = self._opened(contender, data), len(data)
        peak = most_mib(functools.partial(self._epoch, loader, images)) - before
        self.contenders[name], self.loaders[name] = contender, loader
        self.images[name], self.peak_mib[name] = images, peak

    def _opened(self, contender: Contender, data: Any, **changes: Any) -> Loader:
        return contender.open(
            data, replace(self.setting, **{"batch_size": min(self.setting.batch_size, len(data))} | changes)
        )

    def _epoch(self, loader: Loader, images: int) -> None:
        seen = 0
        for batch in loader:
            for view in batch:
                assert view.shape[1:] == (3, self.side, self.side)
                assert view.dtype == self.dtype
                view.to(DEVICE, non_blocking=True)
            seen += len(batch[0])
        assert seen == images

    def _check(self) -> tuple[dict[str, Check], dict[str, str]]:
        """Pixels of all but the first where nothing is random, and averages over views; and the notes."""
        first = next(iter(self.contenders.values()))
        checks: dict[str, Check] = {}
        notes: dict[str, list[str]] = {}
        ours = functools.cache(lambda views: self._looks_of_ours(first, views))
        for name, contender in itertools.islice(self.contenders.items(), 1, None):
            notes[name] = [contender.note] if contender.note else []
            views = replace(self.setting.views, **contender.recipe)
            if not contender.differs:
                checks[name] = self._check_pixels(first, contender, views)
            if not contender.same_draws and self.side != GRID:
                share, where = Looks.of(self.loaders[name], self.setting.views).apart(ours(views))
                if not contender.differs:
                    Check(f"averages over the views, {where}, as a share of what chance allows", share, 1.0)
                said = f"averages over {LOOKED_AT} images' views differ by {share:.2f} of what chance allows ({where})"
                notes[name].append(f"another function: {said}" if contender.differs else said)
        return checks, {name: "; ".join(each) for name, each in notes.items() if each}

    def _check_pixels(self, first: Contender, contender: Contender, views: Views) -> Check:
        what = "views of equal seeds, mean levels of 255"
        if not contender.same_draws:
            views, what = without_chance(views), "views with nothing random, mean levels of 255"
        if self.side == GRID:
            what = "decoded pixels, mean levels of 255"
        pair = [self._opened(each, self.data.few, views=views, workers=0, shuffle=False) for each in (contender, first)]
        check = Check(what, pixels_apart(*pair, views), PIXELS_BOUND)
        close(pair)
        return check

    def _looks_of_ours(self, first: Contender, views: Views) -> Looks:
        loader = self._opened(first, self.data.once, views=views, workers=0)
        looks = Looks.of(loader, views)
        close([loader])
        return looks

    def run(self, suite: Suite, headline: bool = True) -> None:
        """Time, check and record."""
        settle_heap()
        epochs = {
            name: functools.partial(self._epoch, loader, self.images[name]) for name, loader in self.loaders.items()
        }
        sizes = {"image_size": self.setting.views.image_size, "views": 2, "batch_size": self.setting.batch_size}
        suite.interleave(epochs, sizes=sizes | {"workers": WORKERS, "cores": CORES}, rounds=ROUNDS)
        checks, notes = self._check()
        others = dict(itertools.islice(self.contenders.items(), 1, None))
        suite.record(
            images=self.images,
            peak_mib=self.peak_mib,
            checks=checks,
            missing=self.missing,
            notes=notes,
            ours=[name for name, each in others.items() if each.same_draws and not each.tried],
            tried=[name for name, each in others.items() if each.tried],
            differing=[name for name, each in others.items() if each.differs],
            headline=headline,
            images_from=self.data.origin,
            torch_threads=torch.get_num_threads(),
        )
        close(self.loaders.values())
        self.loaders.clear()
        gc.collect()  # rivals' workers end with their loaders


def close(loaders: Iterable[Loader]) -> None:
    for loader in loaders:
        getattr(loader, "close", lambda: None)()
