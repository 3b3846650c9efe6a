"""Compare contenders on a noisy machine: in rounds, one call of each per round, by the median of the rounds' ratios.

A machine that slows down for a second slows every contender of that round, and the ratio stays. Each timed call follows
an untimed one of the same contender, so that nobody pays for the caches and the heap that the previous one left; calls
that take a second need none.

    def test_sum(suite: Suite) -> None:                         # the fixture of conftest.py
        timing = suite.interleave({"ours": f, "theirs": g}, sizes={"numbers": 512})     # ours first
        suite.record(checks={"theirs": Check("sum, relative", error, 1e-6)})            # what benchmarks.report reads

BENCH_SECONDS (default 300) is the time that each bench_*.py may take. What is left of it is shared by the tests that
remain, and decides how many rounds a test gets: at least MIN_ROUNDS. A test that has no time for those is skipped, and
says so. BENCH_SMALL=1 runs everything at sizes at which the figures mean nothing, to see that it runs.
"""

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

SMALL = os.environ.get("BENCH_SMALL") == "1"
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DEVICE_NAME = torch.cuda.get_device_name() if ON_GPU else "cpu"
CORES = 1 if SMALL else len(os.sched_getaffinity(0))

MIN_ROUNDS = 3
WARM_UP_ROUNDS, WARM_UP_SECONDS, WARM_UP_PART = 3, 2.0, 0.1  # at least one round; the part is of a test's share
LONG_CALL_SECONDS = 1.0
TIMED_PART = 0.6  # of a test's share; the rest is for checks and memory
COMPILE_SECONDS = 60.0  # that torch.compile may take on two cores
NO_TIME_TO_COMPILE = "is compiled: not at small sizes, nor without time for it"
SHOW_SECONDS = 10.0  # between two lines of the same contender


class Budget:
    """The seconds that one file of benchmarks may take."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @classmethod
    def from_environment(cls) -> "Budget":
        return cls(float(os.environ.get("BENCH_SECONDS", "300")))

    def left(self) -> float:
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, sample: list[float]) -> "Spread":
        lower, median, upper = statistics.quantiles(sample, method="inclusive") if len(sample) > 1 else 3 * sample
        return cls(median, lower, upper)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lower:.2f} to {self.upper:.2f})"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each contender, and each rival's time over that of the first."""

    rounds: int
    milliseconds: dict[str, Spread]
    speedup: dict[str, Spread]


@dataclass(frozen=True)
class Check:
    """That a contender computes the same function as the first: measured after timing, on what was timed."""

    what: str
    """E.g. "loss, relative" or "views, mean levels of 255"."""
    error: float
    bound: float

    def __post_init__(self) -> None:
        assert self.error <= self.bound, f"another function: {self.what} {self.error:.3g}, beyond {self.bound:.3g}"


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def verdict(what: str, got: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """The line that says whether a target is met."""
    met = (at_least is None or got >= at_least) and (at_most is None or got <= at_most)
    bound = f"at most {at_most:g}" if at_least is None else f"at least {at_least:g}"
    return f"{what} {bound}: {'met' if met else 'MISSED'} ({got:.3g})"


@dataclass
class Suite:
    """One benchmark. tests: how many share what is left of the budget, this one included. say: prints a line."""

    benchmark: BenchmarkFixture
    name: str = ""
    budget: Budget = field(default_factory=Budget)
    tests: int = 1
    say: Callable[[str], object] = print

    def __post_init__(self) -> None:
        self.share = self.budget.left() / self.tests
        self._started = time.monotonic()
        self._shown: dict[str, float] = {}
        self._sizes: Mapping[str, object] = {}

    def share_left(self) -> float:
        return self.share - (time.monotonic() - self._started)

    def may_compile(self) -> bool:
        """Whether there is time to compile a contender and to measure it."""
        return not SMALL and self.budget.left() > 2 * COMPILE_SECONDS

    def skip(self, reason: str) -> NoReturn:
        self.say(f"{self.name}: skipped: {reason}")
        pytest.skip(reason)

    def interleave(
        self,
        contenders: Mapping[str, Callable[[], object]],
        *,
        sizes: Mapping[str, object],
        rounds: int = 20,
        repeats: int = 1,
    ) -> Timing:
        """Time the contenders in alternation, rivals in an order that reverses from round to round.

        contenders: by name; the first is ours, the one that pytest-benchmark's own columns show. rounds: the most that
        is of use. repeats: calls timed as one, so that they share a wait for the GPU; times are of one of them.
        """
        ours, *rivals = contenders
        self._sizes = sizes
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        last: dict[str, float] = {}  # seconds of all repeats
        turn = itertools.count()

        def call(name: str) -> None:
            start = time.perf_counter()
            for _ in range(repeats):
                contenders[name]()
            self.synchronize()
            last[name] = time.perf_counter() - start
            seconds[name].append(last[name] / repeats)
            self._show(name, seconds[name], seconds[ours] or [last[ours] / repeats])  # at first ours is yet to come

        def lead_in(name: str) -> None:
            if name in short:
                contenders[name]()
                self.synchronize()

        def call_rivals() -> None:
            for name in rivals if next(turn) % 2 else reversed(rivals):
                lead_in(name)
                call(name)
            lead_in(ours)

        start = time.monotonic()
        for _ in range(1 if SMALL else WARM_UP_ROUNDS):
            for name in contenders:
                call(name)
                # At the least, until all are warm and have their rounds; not an hour for the first of ten slow ones.
                calls = len(contenders) - len(last) + min(MIN_ROUNDS, rounds) * len(contenders)
                self._require(calls * min(last.values()), rounds)
            if time.monotonic() - start > min(WARM_UP_SECONDS, WARM_UP_PART * self.share):
                break
        short = {name for name, each in last.items() if each < LONG_CALL_SECONDS}
        round_seconds = sum(2 * each if name in short else each for name, each in last.items())
        self._require(min(MIN_ROUNDS, rounds) * round_seconds, rounds)
        fit = int(min(rounds, TIMED_PART * max(0.0, self.share_left()) / round_seconds))
        rounds = max(fit, min(MIN_ROUNDS, rounds))
        for each in seconds.values():
            each.clear()
        self.benchmark.pedantic(call, args=(ours,), setup=call_rivals, rounds=rounds)
        assert len({len(each) for each in seconds.values()}) == 1, (
            "pytest-benchmark called ours more often than its setup"
        )

        timing = Timing(
            rounds=rounds,
            milliseconds={name: Spread.of([1e3 * s for s in each]) for name, each in seconds.items()},
            speedup={
                name: Spread.of([a / b for a, b in zip(seconds[name], seconds[ours], strict=True)]) for name in rivals
            },
        )
        self.benchmark.extra_info.update(asdict(timing))
        return timing

    def _require(self, seconds: float, rounds: int) -> None:
        """Skip the test if its fewest rounds take longer than is left."""
        left = max(0.0, self.budget.left())
        if seconds > left:
            least = f"{min(MIN_ROUNDS, rounds)} rounds take about {seconds:.0f} s"
            self.skip(f"{least}, and {left:.0f} s are left of BENCH_SECONDS={self.budget.seconds:g}")

    def synchronize(self) -> None:
        if ON_GPU:
            torch.cuda.synchronize()

    def _show(self, name: str, seconds: Sequence[float], ours: Sequence[float]) -> None:
        """One line, the first time that a contender is measured and then every few seconds."""
        now = time.monotonic()
        if now - self._shown.get(name, -math.inf) < SHOW_SECONDS:
            return
        self._shown[name] = now
        ratio = statistics.median(seconds) / statistics.median(ours)
        milliseconds = 1e3 * statistics.median(seconds)
        self.say(f"{self.name} | {listed(self._sizes)} | {name} | {milliseconds:.4g} ms | {ratio:.3g} x ours")

    def record(
        self,
        *,
        device: str = DEVICE_NAME,
        images: Mapping[str, int] | None = None,
        peak_mib: Mapping[str, float] | None = None,
        checks: Mapping[str, Check] | None = None,
        missing: Mapping[str, str] | None = None,
        notes: Mapping[str, str] | None = None,
        ours: Collection[str] = (),
        tried: Collection[str] = (),
        yardsticks: Collection[str] = (),
        differing: Collection[str] = (),
        headline: bool = True,
        images_from: str = "",
    ) -> None:
        """Print what was measured, and put what `benchmarks.report` needs beside the times into benchmark.extra_info.

        images: source images of a call of each contender. missing: contenders that were not measured, and why.
        ours: other setups of the package. tried: variants of it that exist in benchmarks/ alone. yardsticks: those that
        do other work. None of these is a rival. differing: rivals that compute another function, or in less precision,
        as their notes say. All others but the first have to be checked. headline: it gets a row in README.md.
        """
        info = self.benchmark.extra_info
        unchecked = set(info["speedup"]) - {*(checks or {}), *yardsticks, *differing}
        assert not unchecked, f"not checked, and not said to differ: {', '.join(sorted(unchecked))}"
        unsaid = set(differing) - set(notes or {})
        assert not unsaid, f"how far off they are is not in the notes: {', '.join(sorted(unsaid))}"
        info.update(
            device=device,
            sizes=dict(self._sizes),
            images=dict(images or {}),
            peak_mib=dict(peak_mib or {}),
            checks={name: asdict(check) for name, check in (checks or {}).items()},
            missing=dict(missing or {}),
            notes=dict(notes or {}),
            ours=list(ours),
            tried=list(tried),
            yardsticks=list(yardsticks),
            differing=list(differing),
            headline=headline,
            images_from=images_from,
            targets=[],
        )
        self._show_all(info)

    def _show_all(self, info: Mapping[str, Any]) -> None:
        self.say(f"{self.name}: {listed(info['sizes'])}; {info['device']}; {info['rounds']} rounds, median (quartiles)")
        for name, milliseconds in info["milliseconds"].items():
            cells = [f"  {name:42} {Spread(**milliseconds)} ms"]
            if name in info["speedup"]:
                cells.append(f"{Spread(**info['speedup'][name])} x ours")
            if name in info["images"]:
                cells.append(f"{1e3 * info['images'][name] / milliseconds['median']:,.0f} images/s")
            if name in info["peak_mib"]:
                cells.append(f"{info['peak_mib'][name]:.1f} MiB")
            if name in info["checks"]:
                cells.append("{what} {error:.1g}".format(**info["checks"][name]))
            if name in info["notes"]:
                cells.append(info["notes"][name])
            self.say("; ".join(cells))
        for name, why in info["missing"].items():
            self.say(f"  {name:42} not measured: {why}")

    def judge(self, *verdicts: str) -> None:
        """Print and record whether targets are met; at small sizes they mean nothing."""
        for each in () if SMALL else verdicts:
            self.say(f"  target, {each}")
            self.benchmark.extra_info["targets"].append(each)


def listed(sizes: Mapping[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sizes.items())
