"""What `pytest benchmarks --benchmark-json=FILE` has written, as benchmarks.report needs it.

measured, left_out = read(["cpu.json", "h200.json"])
measured[0].first.time_ms.median, measured[0].rivals[0].ratio.median
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from benchmarks.suite import Check, Spread

TOO_WIDE = 0.2  # a spread above it is marked wherever it is shown


class Mistake(Exception):
    """A user mistake, reported as one line."""


class Kind(Enum):
    FIRST = "ours"  # the one that the others are compared with
    OURS = "ours, set up otherwise"
    TRIED = "ours, tried in benchmarks/ only"
    RIVAL = "others"
    YARDSTICK = "other work, as a yardstick"


@dataclass(frozen=True)
class Contender:
    """One contender of a benchmark.

    time_ms: of a call. ratio: its time over the first's of the same round, per image where both say how many they take;
    of the first None. images: of a call. peak_mib, check: None where it was not measured. differs: it computes
    another function, or in less precision, as its note says.
    """

    name: str
    kind: Kind
    time_ms: Spread
    ratio: Spread | None
    images: int | None
    peak_mib: float | None
    check: Check | None
    differs: bool
    note: str

    @property
    def images_per_second(self) -> float | None:
        return None if self.images is None else 1e3 * self.images / self.time_ms.median

    @property
    def spread(self) -> float:
        """Between the quartiles of the ratio, over its median; 0 of the first."""
        return (self.ratio.upper - self.ratio.lower) / self.ratio.median if self.ratio else 0.0


@dataclass(frozen=True)
class Setup:
    """What it was measured on; equal ones are one footnote. device: the GPU's name, or the CPU's."""

    device: str
    on_gpu: bool
    processor: str
    cores: int | None
    threads: int | None
    python: str
    packages: tuple[tuple[str, str], ...]
    commit: str
    date: str

    @property
    def short(self) -> str:
        return self.device.removeprefix("NVIDIA ") if self.on_gpu else "CPU"

    def __str__(self) -> str:
        parts = [
            f"{self.device}, on {self.processor}" if self.on_gpu else self.device,
            f"{counted(self.cores, 'core')}, {counted(self.threads, 'thread')}",
            ", ".join(f"{name} {version}" for name, version in (("Python", self.python), *self.packages)),
            f"commit {self.commit}",
            self.date,
        ]
        return "; ".join(parts)


@dataclass(frozen=True)
class Measured:
    """One benchmark on one device. contenders: the first, then the fastest first. source: the file's name."""

    group: str
    name: str
    sizes: tuple[tuple[str, str], ...]
    setup: Setup
    source: str
    rounds: int
    contenders: tuple[Contender, ...]
    missing: Mapping[str, str]
    headline: bool

    @property
    def first(self) -> Contender:
        return self.contenders[0]

    @property
    def rivals(self) -> list[Contender]:
        return [each for each in self.contenders if each.kind is Kind.RIVAL]

    @property
    def size(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.sizes)

    @property
    def key(self) -> tuple[str, str, str]:
        """The same benchmark, on whatever device."""
        return self.group, self.name, self.size


def counted(number: int | None, thing: str) -> str:
    return f"{'?' if number is None else number} {thing}{'' if number == 1 else 's'}"


def number(value: float) -> str:
    """Three digits, and no exponent where a reader wants none."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-3 else f"{value:.1g}"


def is_of_pytest_benchmark(page: object) -> bool:
    return isinstance(page, dict) and {"machine_info", "commit_info", "datetime", "benchmarks"} <= page.keys()


def committed(folder: Path) -> list[Path]:
    """The files in a folder that pytest-benchmark has written, without other measurements."""
    return [file for file in sorted(folder.glob("*.json")) if is_of_pytest_benchmark(json.loads(file.read_text()))]


def read(files: Iterable[str | Path]) -> tuple[list[Measured], list[str]]:
    """All that is measured in these files; and of each file that has others, which are left out, why."""
    measured: list[Measured] = []
    left_out: list[str] = []
    for file in map(Path, files):
        try:
            page = json.loads(file.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise Mistake(f"{file}: {error.strerror if isinstance(error, OSError) else 'is no JSON'}") from error
        if not is_of_pytest_benchmark(page):
            raise Mistake(f"{file}: is not what pytest benchmarks --benchmark-json=FILE writes")
        compared = [each for each in page["benchmarks"] if "milliseconds" in each["extra_info"]]
        sized = [each for each in compared if "sizes" in each["extra_info"]]
        measured += [_measured(each, page, file.name) for each in sized]
        if lacking := len(compared) - len(sized):
            benchmarks = counted(lacking, "benchmark")
            left_out.append(f"{file.name} is of an older form, which does not say the sizes: {benchmarks} left out")
        if alone := len(page["benchmarks"]) - len(compared):
            left_out.append(f"{file.name}: left out {counted(alone, 'benchmark')} without contenders")
    return measured, left_out


def _measured(benchmark: dict[str, Any], page: dict[str, Any], source: str) -> Measured:
    info = benchmark["extra_info"]
    first, *others = (_contender(name, info) for name in info["milliseconds"])
    return Measured(
        group=benchmark["group"] or benchmark["name"],
        name=benchmark["name"],
        sizes=tuple((name, str(value)) for name, value in info["sizes"].items()),
        setup=_setup(page, info["device"]),
        source=source,
        rounds=info["rounds"],
        contenders=(first, *sorted(others, key=lambda each: each.ratio.median if each.ratio else 0.0)),
        missing=info.get("missing", {}),
        headline=info.get("headline", True),
    )


def _contender(name: str, info: dict[str, Any]) -> Contender:
    first = next(iter(info["milliseconds"]))
    images = info.get("images", {})
    ratio, kind = None, Kind.FIRST
    if name != first:
        # The suite knows of calls only: this is the one place where a ratio becomes one of images.
        scale = images[first] / images[name] if {first, name} <= images.keys() else 1.0
        ratio = Spread(**{each: scale * value for each, value in info["speedup"][name].items()})
        kinds = {"yardsticks": Kind.YARDSTICK, "tried": Kind.TRIED, "ours": Kind.OURS}
        kind = next((kind for key, kind in kinds.items() if name in info.get(key, ())), Kind.RIVAL)
    check = info.get("checks", {}).get(name)
    return Contender(
        name=name,
        kind=kind,
        time_ms=Spread(**info["milliseconds"][name]),
        ratio=ratio,
        images=images.get(name),
        peak_mib=info.get("peak_mib", {}).get(name),
        check=Check(**check) if check else None,
        differs=name in info.get("differing", ()),
        note=info.get("notes", {}).get(name, ""),
    )


def _setup(page: dict[str, Any], device: str) -> Setup:
    machine, commit = page["machine_info"], page["commit_info"]
    known = commit.get("id") not in (None, "", "unknown", "unversioned")
    packages = machine.get("packages", {}).items()
    return Setup(
        device=machine.get("cpu", "unknown CPU") if device == "cpu" else device,
        on_gpu=device != "cpu",
        processor=machine.get("cpu", "unknown CPU"),
        cores=machine.get("cores"),
        threads=machine.get("torch_threads"),
        python=machine.get("python", "unknown"),
        packages=tuple((name, version) for name, version in packages if version != "not installed"),
        commit=(commit["id"][:7] if known else "unknown") + (" + changes" if commit.get("dirty") else ""),
        date=page["datetime"][:10],
    )
