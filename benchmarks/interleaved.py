"""Compare contenders on a noisy machine: in rounds, one call of each per round, by the median of the rounds' ratios.

A machine that slows down for a second slows every contender of that round, and the ratio stays. Timing one contender
after the other would put the slow second on one of them. Each timed call follows an untimed one of the same contender,
so that nobody is charged for the caches and the heap that the one before has left.

    timing = interleave(benchmark, {"ours": f, "theirs": g}, rounds=20)     # pytest-benchmark's fixture; "ours" first
    timing.speedup["theirs"].median     # how many times faster "ours" is
    print(timing)                       # a table; the same figures are in the JSON's extra_info
"""

import itertools
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass

from pytest_benchmark.fixture import BenchmarkFixture


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
    """What `interleave` measured: milliseconds of each contender, and each rival's time over that of the first."""

    rounds: int
    milliseconds: dict[str, Spread]
    speedup: dict[str, Spread]

    def __str__(self) -> str:
        lines = [f"{self.rounds} rounds; median (quartiles)"]
        for name, spread in self.milliseconds.items():
            ratio = f"   {self.speedup[name]} times the first's" if name in self.speedup else ""
            lines.append(f"  {name:24} {spread} ms{ratio}")
        return "\n".join(lines)


def interleave(
    benchmark: BenchmarkFixture,
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup_rounds: int = 3,
    synchronize: Callable[[], object] = lambda: None,
) -> Timing:
    """Time the contenders in alternation; the first is ours, the one that pytest-benchmark's own columns show.

    contenders: by name; each is called 2 · (warmup_rounds + rounds) times, rivals in an order that reverses from round
    to round. synchronize: waits for the device, e.g. torch.cuda.synchronize; called before a clock is read.
    Puts rounds, milliseconds and speedup into benchmark.extra_info.
    """
    ours, *rivals = contenders
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    turn = itertools.count()

    def lead_in(name: str) -> None:
        contenders[name]()
        synchronize()

    def call(name: str) -> None:
        start = time.perf_counter()
        contenders[name]()
        synchronize()
        seconds[name].append(time.perf_counter() - start)

    def call_rivals() -> None:
        for name in rivals if next(turn) % 2 else reversed(rivals):
            lead_in(name)
            call(name)
        lead_in(ours)

    for _ in range(warmup_rounds):
        for name in contenders:
            lead_in(name)
            call(name)
    benchmark.pedantic(call, args=(ours,), setup=call_rivals, rounds=rounds)
    assert len({len(each) for each in seconds.values()}) == 1, "pytest-benchmark called ours more often than its setup"

    measured = {name: each[warmup_rounds:] for name, each in seconds.items()}
    timing = Timing(
        rounds=len(measured[ours]),
        milliseconds={name: Spread.of([1e3 * s for s in each]) for name, each in measured.items()},
        speedup={
            name: Spread.of([a / b for a, b in zip(measured[name], measured[ours], strict=True)]) for name in rivals
        },
    )
    benchmark.extra_info.update(asdict(timing))
    return timing


@dataclass(frozen=True)
class Check:
    """That a contender computes the same function as the first: measured after timing, on what was timed."""

    what: str
    """E.g. "loss, relative" or "views, mean levels of 255"."""
    error: float
    bound: float

    def __post_init__(self) -> None:
        assert self.error <= self.bound, f"another function: {self.what} {self.error:.3g}, beyond {self.bound:.3g}"


def describe(
    benchmark: BenchmarkFixture,
    *,
    device: str,
    sizes: Mapping[str, object],
    images: Mapping[str, int] | None = None,
    peak_mib: Mapping[str, float] | None = None,
    checks: Mapping[str, Check] | None = None,
    missing: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
    ours: Collection[str] = (),
    yardsticks: Collection[str] = (),
    differing: Collection[str] = (),
    headline: bool = True,
) -> None:
    """What `benchmarks.report` needs to know of an interleaved benchmark beside its times, into benchmark.extra_info.

    device: "cpu", or the GPU's name. sizes: what was computed, e.g. {"batch_size": 256}. images: source images a call
    of each contender, where a rate says more than a time. peak_mib, checks, notes: by contender. missing: contenders
    that are not here, and why. ours: contenders beside the first that are ours, too. yardsticks: those that do other
    work, e.g. a plain matrix product; neither is a rival. differing: rivals that compute another function, or in less
    precision, and how far off they are is in their notes. All others but the first have to be checked. headline:
    whether it gets a row in README.md.
    """
    compared = set(benchmark.extra_info["speedup"])
    unchecked = compared - {*(checks or {}), *yardsticks, *differing}
    assert not unchecked, f"not checked, and not said to differ: {', '.join(sorted(unchecked))}"
    unsaid = set(differing) - set(notes or {})
    assert not unsaid, f"how far off they are is not in the notes: {', '.join(sorted(unsaid))}"
    benchmark.extra_info.update(
        device=device,
        sizes=dict(sizes),
        images=dict(images or {}),
        peak_mib=dict(peak_mib or {}),
        checks={name: asdict(check) for name, check in (checks or {}).items()},
        missing=dict(missing or {}),
        notes=dict(notes or {}),
        ours=list(ours),
        yardsticks=list(yardsticks),
        differing=list(differing),
        headline=headline,
    )
