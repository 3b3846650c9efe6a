"""Compare contenders on a noisy machine: time one call of each per round, and report the median of the rounds' ratios.

A machine that slows down for a second slows all contenders of that round, so the ratio hardly changes. Each timed call
follows an untimed one of the same contender, so that no contender pays for the state of the caches and the heap that
the previous one left. Calls of a second or more need no untimed call.

    def test_sum(suite: Suite) -> None:                         # the fixture in conftest.py
        timing = suite.interleave({"ours": f, "theirs": g}, sizes={"numbers": 512})     # ours first
        suite.record(checks={"theirs": Check("relative error of the sum", error, 1e-6)})   # for benchmarks.report

BENCH_SECONDS (default 300) is the time budget of each bench_*.py. The remaining tests share the remaining time, which
determines their number of rounds: at least MIN_ROUNDS. A test without time for those is skipped, with a message.
BENCH_SMALL=1 runs everything at small sizes, only to check that it runs; its figures mean nothing.
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
# The warm-up ends after that many rounds, that time, or that fraction of the test's budget, but not before one round.
WARM_UP_ROUNDS, WARM_UP_SECONDS, WARM_UP_FRACTION = 3, 2.0, 0.1
LONG_CALL_SECONDS = 1.0
TIMED_FRACTION = 0.6  # of the test's budget; the rest is for checks and peak memory
COMPILE_SECONDS = 60.0  # expected time of torch.compile on two cores
NO_TIME_TO_COMPILE = "not compiled at small sizes, nor without time for it"
PROGRESS_SECONDS = 10.0  # between two progress lines of the same contender


class Budget:
    """Time budget of one benchmark file, in seconds."""

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
    """Milliseconds of each contender, and each other contender's time divided by that of the first."""

    rounds: int
    milliseconds: dict[str, Spread]
    speedup: dict[str, Spread]


@dataclass(frozen=True)
class Check:
    """Check that a contender computes the same function as the first; made after timing, on what was timed."""

    what: str
    """What is compared, such as "relative error of the loss"."""
    error: float
    bound: float

    def __post_init__(self) -> None:
        assert self.error <= self.bound, f"different function: {self.what} is {self.error:.3g}, above {self.bound:.3g}"


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def error_line(error: Exception) -> str:
    """Return the error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def verdict(what: str, got: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """Return a line that says whether a target is met."""
    met = (at_least is None or got >= at_least) and (at_most is None or got <= at_most)
    bound = f"at most {at_most:g}" if at_least is None else f"at least {at_least:g}"
    return f"{what} {bound}: {'met' if met else 'MISSED'} ({got:.3g})"


@dataclass
class Suite:
    """One benchmark.

    tests: number of tests that share the remaining budget, including this one. write_line: prints a line of progress.
    """

    benchmark: BenchmarkFixture
    name: str = ""
    budget: Budget = field(default_factory=Budget)
    tests: int = 1
    write_line: Callable[[str], object] = print

    def __post_init__(self) -> None:
        self.test_seconds = self.budget.left() / self.tests
        self._started = time.monotonic()
        self._printed_at: dict[str, float] = {}
        self._sizes: Mapping[str, object] = {}

    def test_seconds_left(self) -> float:
        return self.test_seconds - (time.monotonic() - self._started)

    def may_compile(self) -> bool:
        """Return whether there is time to compile a contender and to measure it."""
        return not SMALL and self.budget.left() > 2 * COMPILE_SECONDS

    def skip(self, reason: str) -> NoReturn:
        self.write_line(f"{self.name}: skipped: {reason}")
        pytest.skip(reason)

    def interleave(
        self,
        contenders: Mapping[str, Callable[[], object]],
        *,
        sizes: Mapping[str, object],
        rounds: int = 20,
        repeats: int = 1,
    ) -> Timing:
        """Time the contenders in turn; the order of all but the first is reversed from round to round.

        contenders: calls by name; pytest-benchmark's own columns show the first. rounds: maximum number of rounds.
        repeats: number of calls timed as one, with one GPU synchronization; the times are per call.
        """
        first, *others = contenders
        self._sizes = sizes
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        last: dict[str, float] = {}  # seconds of all repeats
        round_number = itertools.count()

        def call(name: str) -> None:
            start = time.perf_counter()
            for _ in range(repeats):
                contenders[name]()
            self.synchronize()
            last[name] = time.perf_counter() - start
            seconds[name].append(last[name] / repeats)
            # In a round, the first contender is called last.
            self._print_progress(name, seconds[name], seconds[first] or [last[first] / repeats])

        def untimed_call(name: str) -> None:
            if name in short:
                contenders[name]()
                self.synchronize()

        def call_others() -> None:
            for name in others if next(round_number) % 2 else reversed(others):
                untimed_call(name)
                call(name)
            untimed_call(first)

        start = time.monotonic()
        for _ in range(1 if SMALL else WARM_UP_ROUNDS):
            for name in contenders:
                call(name)
                # A lower bound of the remaining time, so that slow contenders are skipped after one call.
                calls = len(contenders) - len(last) + min(MIN_ROUNDS, rounds) * len(contenders)
                self._require(calls * min(last.values()), rounds)
            if time.monotonic() - start > min(WARM_UP_SECONDS, WARM_UP_FRACTION * self.test_seconds):
                break
        short = {name for name, each in last.items() if each < LONG_CALL_SECONDS}
        round_seconds = sum(2 * each if name in short else each for name, each in last.items())
        self._require(min(MIN_ROUNDS, rounds) * round_seconds, rounds)
        fit = int(min(rounds, TIMED_FRACTION * max(0.0, self.test_seconds_left()) / round_seconds))
        rounds = max(fit, min(MIN_ROUNDS, rounds))
        for each in seconds.values():
            each.clear()
        self.benchmark.pedantic(call, args=(first,), setup=call_others, rounds=rounds)
        assert len({len(each) for each in seconds.values()}) == 1, (
            "pytest-benchmark called the first contender more often than its setup"
        )

        timing = Timing(
            rounds=rounds,
            milliseconds={name: Spread.of([1e3 * s for s in each]) for name, each in seconds.items()},
            speedup={
                name: Spread.of([a / b for a, b in zip(seconds[name], seconds[first], strict=True)]) for name in others
            },
        )
        self.benchmark.extra_info.update(asdict(timing))
        return timing

    def _require(self, seconds: float, rounds: int) -> None:
        """Skip the test if its minimum number of rounds takes longer than the remaining budget."""
        left = max(0.0, self.budget.left())
        if seconds > left:
            needed = f"{min(MIN_ROUNDS, rounds)} rounds take about {seconds:.0f} s"
            self.skip(f"{needed}, but only {left:.0f} s of BENCH_SECONDS={self.budget.seconds:g} are left")

    def synchronize(self) -> None:
        if ON_GPU:
            torch.cuda.synchronize()

    def _print_progress(self, name: str, seconds: Sequence[float], first: Sequence[float]) -> None:
        """Print a line the first time that a contender is measured, and then every few seconds."""
        now = time.monotonic()
        if now - self._printed_at.get(name, -math.inf) < PROGRESS_SECONDS:
            return
        self._printed_at[name] = now
        ratio = statistics.median(seconds) / statistics.median(first)
        milliseconds = 1e3 * statistics.median(seconds)
        sizes = format_sizes(self._sizes)
        self.write_line(f"{self.name} | {sizes} | {name} | {milliseconds:.4g} ms | relative time {ratio:.3g}")

    def record(
        self,
        *,
        device: str = DEVICE_NAME,
        images: Mapping[str, int] | None = None,
        peak_mib: Mapping[str, float] | None = None,
        checks: Mapping[str, Check] | None = None,
        missing: Mapping[str, str] | None = None,
        notes: Mapping[str, str] | None = None,
        variants: Collection[str] = (),
        experiments: Collection[str] = (),
        references: Collection[str] = (),
        inexact: Collection[str] = (),
        readme_task: str = "",
        images_from: str = "",
    ) -> None:
        """Print the results, and add what `benchmarks.report` needs besides the times to benchmark.extra_info.

        images: source images per call of each contender. missing: contenders that were not measured, and why.
        images_from: origin of the images. readme_task: title of this benchmark's row in README.md; none if empty.

        Contenders are alternatives to the first, unless they are listed as one of these: variants: other settings of
        the package; experiments: implementations that exist in benchmarks/ only; references: different work.

        inexact: alternatives that compute another function, or at lower precision, as their notes must say. All other
        contenders except the first and the references need a check.
        """
        info = self.benchmark.extra_info
        unchecked = set(info["speedup"]) - {*(checks or {}), *references, *inexact}
        assert not unchecked, f"neither checked nor listed as inexact: {', '.join(sorted(unchecked))}"
        without_note = set(inexact) - set(notes or {})
        assert not without_note, f"inexact contenders without a note on their error: {', '.join(sorted(without_note))}"
        info.update(
            device=device,
            sizes=dict(self._sizes),
            images=dict(images or {}),
            peak_mib=dict(peak_mib or {}),
            checks={name: asdict(check) for name, check in (checks or {}).items()},
            missing=dict(missing or {}),
            notes=dict(notes or {}),
            variants=list(variants),
            experiments=list(experiments),
            references=list(references),
            inexact=list(inexact),
            readme_task=readme_task,
            images_from=images_from,
            targets=[],
        )
        self._print_results(info)

    def _print_results(self, info: Mapping[str, Any]) -> None:
        self.write_line(
            f"{self.name}: {format_sizes(info['sizes'])}; {info['device']}; {info['rounds']} rounds, median (quartiles)"
        )
        for name, milliseconds in info["milliseconds"].items():
            cells = [f"  {name:42} {Spread(**milliseconds)} ms"]
            if name in info["speedup"]:
                cells.append(f"relative time {Spread(**info['speedup'][name])}")
            if name in info["images"]:
                cells.append(f"{1e3 * info['images'][name] / milliseconds['median']:,.0f} images/s")
            if name in info["peak_mib"]:
                cells.append(f"{info['peak_mib'][name]:.1f} MiB")
            if name in info["checks"]:
                cells.append("{what} {error:.1g}".format(**info["checks"][name]))
            if name in info["notes"]:
                cells.append(info["notes"][name])
            self.write_line("; ".join(cells))
        for name, why in info["missing"].items():
            self.write_line(f"  {name:42} not measured: {why}")

    def record_targets(self, *verdicts: str) -> None:
        """Print and record whether the targets are met, except at small sizes, where they mean nothing."""
        for each in () if SMALL else verdicts:
            self.write_line(f"  target, {each}")
            self.benchmark.extra_info["targets"].append(each)


def format_sizes(sizes: Mapping[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sizes.items())
