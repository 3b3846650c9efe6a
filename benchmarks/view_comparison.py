"""How bench_views.py compares loaders: opened on the same images, timed in alternation, checked, recorded."""

import functools
import gc
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.interleaved import Check, Timing, describe, interleave
from benchmarks.memory import most_mib, settle_heap, trimmed_mib
from benchmarks.sizes import SMALL
from benchmarks.view_checks import PIXELS_BOUND, Looks, pixels_apart, without_chance
from benchmarks.view_contenders import GRID, Contender, Loader, Setting

ROUNDS = 2 if SMALL else 5
LOOKED_AT = 96 if SMALL else 512  # images whose views' averages are compared
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE_NAME = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
CORES = 1 if SMALL else len(os.sched_getaffinity(0))
WORKERS = min(16, CORES)


def close(loader: Loader) -> None:
    if hasattr(loader, "close"):
        loader.close()


class Comparison:
    """Contenders opened on the same data, timed in alternation, and checked. The first is ours.

    whole, once, few: the data of an epoch, of a slow contender's, and of the comparison of pixels. form: of what each
    batch has to be.
    """

    def __init__(
        self, contenders: Mapping[str, Contender], setting: Setting, data: tuple[Any, Any, Any], form: tuple[int, Any]
    ) -> None:
        self.setting, self.form = setting, form
        self.whole, self.once, self.few = data
        self.contenders: dict[str, Contender] = {}
        self.missing: dict[str, str] = {}
        self.loaders: dict[str, Loader] = {}
        self.images: dict[str, int] = {}
        self.peak_mib: dict[str, float] = {}
        self._looks: dict[tuple[tuple[str, Any], ...], Looks] = {}
        for name, contender in contenders.items():
            if contender.requires and importlib.util.find_spec(contender.requires) is None:
                self.missing[name] = f"not installed (pip install {contender.requires})"
                continue
            data_ = self.once if contender.slow else self.whole
            try:
                if contender.requires:
                    importlib.import_module(contender.requires)  # else its imports are in its memory
                before = trimmed_mib()
                self.images[name] = len(data_)
                self.loaders[name] = contender.open(data_, replace(setting, batch_size=self._batch(data_)))
                self.peak_mib[name] = most_mib(functools.partial(self.epoch, name)) - before
            except Exception as error:
                if not contender.requires:
                    raise
                self.missing[name] = f"it does not run here: {type(error).__name__}: {str(error)[:200]}"
                self.loaders.pop(name, None)
                continue
            self.contenders[name] = contender
        self.images = {name: self.images[name] for name in self.contenders}

    def _batch(self, data: Any) -> int:
        return min(self.setting.batch_size, len(data))

    def epoch(self, name: str) -> None:
        side, dtype = self.form
        seen = 0
        for batch in self.loaders[name]:
            for view in batch:
                assert view.shape[1:] == (3, side, side)
                assert view.dtype == dtype
                view.to(DEVICE, non_blocking=True)
            seen += len(batch[0])
        assert seen == self.images[name]

    def run(self, benchmark: BenchmarkFixture) -> Timing:
        settle_heap()
        return interleave(
            benchmark,
            {name: functools.partial(self.epoch, name) for name in self.loaders},
            rounds=ROUNDS,
            warmup_rounds=1,
            synchronize=torch.cuda.synchronize if DEVICE == "cuda" else lambda: None,
        )

    def check(self) -> tuple[dict[str, Check], dict[str, str]]:
        """Of all but the first: pixels where nothing is random, and averages; and what else to know of them."""
        first = next(iter(self.contenders))
        checks: dict[str, Check] = {}
        notes = {name: each.note for name, each in self.contenders.items() if each.note}
        for name, contender in self.contenders.items():
            if name == first or contender.differs:
                continue
            recipe = replace(self.setting.views, **contender.recipe)
            what = "views of equal seeds, mean levels of 255"
            if not contender.ours:
                recipe, what = without_chance(recipe), "views with nothing random, mean levels of 255"
            if self.form[0] == GRID:
                what = "decoded pixels, mean levels of 255"
            few = replace(self.setting, views=recipe, batch_size=self._batch(self.few), workers=0, shuffle=False)
            pair = [each.open(self.few, few) for each in (contender, self.contenders[first])]
            checks[name] = Check(what, pixels_apart(*pair, recipe), PIXELS_BOUND)
            for loader in pair:
                close(loader)
            if not contender.ours and self.form[0] != GRID:
                share, where = self.looks(name).apart(self.our_looks(first, contender.recipe))
                Check(f"averages over the views, {where}, as a share of what chance allows", share, 1.0)
                said = f"averages over {LOOKED_AT} images' views differ by {share:.2f} of what chance allows ({where})"
                notes[name] = f"{notes[name]}; {said}" if name in notes else said
        return checks, notes

    def looks(self, name: str) -> Looks:
        return Looks.of(self.loaders[name], self.setting.views, LOOKED_AT)

    def our_looks(self, first: str, changes: Mapping[str, Any]) -> Looks:
        """Ours at the recipe with a contender's changes, of the images that all have; made once each."""
        key = tuple(changes.items())
        if key not in self._looks:
            views = replace(self.setting.views, **changes)
            setting = replace(self.setting, views=views, batch_size=self._batch(self.once), workers=0)
            loader = self.contenders[first].open(self.once, setting)
            self._looks[key] = Looks.of(loader, views, LOOKED_AT)
            close(loader)
        return self._looks[key]

    def close(self) -> None:
        for loader in self.loaders.values():
            close(loader)
        self.loaders.clear()
        gc.collect()  # rivals' workers end with their loaders


def compare(
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
    title: str,
    comparison: Comparison,
    images_from: str,
    notes: Mapping[str, str] | None = None,
    headline: bool = True,
) -> None:
    """Time, check, record and print."""
    setting, images = comparison.setting, comparison.images
    timing = comparison.run(benchmark)
    checks, known = comparison.check()
    known |= notes or {}
    first, *others = images
    describe(
        benchmark,
        device=DEVICE_NAME,
        sizes={
            "image_size": setting.views.image_size,
            "views": 2,
            "batch_size": setting.batch_size,
            "workers": WORKERS,
            "cores": CORES,
        },
        images=images,
        peak_mib=comparison.peak_mib,
        checks=checks,
        missing=comparison.missing,
        notes=known,
        ours=[name for name in others if comparison.contenders[name].ours],
        differing=[name for name in others if comparison.contenders[name].differs],
        headline=headline,
    )
    benchmark.extra_info.update(images_from=images_from, torch_threads=torch.get_num_threads())
    lines = [f"{title} ({images_from}), {DEVICE_NAME}, {CORES} cores; medians of {timing.rounds} interleaved rounds"]
    for name, spread in timing.milliseconds.items():
        scale = images[first] / images[name]
        by = timing.speedup.get(name)
        ratio = f"{scale * by.median:6.2f} ({scale * by.lower:.2f} to {scale * by.upper:.2f}) times ours" if by else ""
        rate = 1e3 * images[name] / spread.median
        lines.append(f"  {name:44} {rate:9,.0f} images/s {comparison.peak_mib[name]:6.0f} MiB {ratio}")
    lines += [f"  {name:44} {check.what}: {check.error:.2f}" for name, check in checks.items()]
    lines += [f"  {name:44} {note}" for name, note in known.items()]
    lines += [f"  {name:44} not here: {why}" for name, why in comparison.missing.items()]
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    comparison.close()
