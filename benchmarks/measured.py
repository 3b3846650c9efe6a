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
class Measured:
    """One benchmark on one device.

    device: "CPU", or the GPU's short name. setup: what it was measured on; equal ones are one footnote. source: the
    file's name. contenders: the first, then the fastest first.
    """

    group: str
    name: str
    sizes: tuple[tuple[str, str], ...]
    device: str
    commit: str
    setup: str
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
        measured += [_measured(each, page, file.name) for each in compared]
        if alone := len(page["benchmarks"]) - len(compared):
            left_out.append(f"{file.name}: left out {counted(alone, 'benchmark')} without contenders")
    return measured, left_out


def _measured(benchmark: dict[str, Any], page: dict[str, Any], source: str) -> Measured:
    info, commit_info = benchmark["extra_info"], page["commit_info"]
    commit = (commit_info.get("id") or "unknown")[:7] + (" + changes" if commit_info.get("dirty") else "")
    first, *others = (_contender(name, info) for name in info["milliseconds"])
    return Measured(
        group=benchmark["group"] or benchmark["name"],
        name=benchmark["name"],
        sizes=tuple((name, str(value)) for name, value in info["sizes"].items()),
        device="CPU" if info["device"] == "cpu" else info["device"].removeprefix("NVIDIA "),
        commit=commit,
        setup=_setup(page, info["device"], commit),
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


def _setup(page: dict[str, Any], device: str, commit: str) -> str:
    machine = page["machine_info"]
    cpu = machine.get("cpu", "unknown CPU")
    versions = {"Python": machine.get("python", "unknown")} | machine.get("packages", {})
    parts = [
        cpu if device == "cpu" else f"{device}, on {cpu}",
        f"{counted(machine.get('cores'), 'core')}, {counted(machine.get('torch_threads'), 'thread')}",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version != "not installed"),
        f"commit {commit}",
        page["datetime"][:10],
    ]
    return "; ".join(parts)
