"""Read the JSON files that `pytest benchmarks --benchmark-json=FILE` writes.

results, left_out = read_results(["cpu.json", "h200.json"])
results[0].first.time_ms.median, results[0].alternatives[0].ratio.median
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from benchmarks.suite import Check, Spread

WIDE_SPREAD = 0.2  # larger spreads are marked in the report, the charts and the README


class UserError(Exception):
    """A user error, reported as one line."""


class Role(Enum):
    """Role of a contender; the value is its label in charts and notes."""

    FIRST = "fastsimclr"  # the others are compared with it
    VARIANT = "fastsimclr, other settings"
    EXPERIMENT = "experiment, in benchmarks/ only"
    ALTERNATIVE = "alternative"
    REFERENCE = "different work, for reference"


@dataclass(frozen=True)
class Contender:
    """One contender of a benchmark.

    time_ms: time of a call. ratio: its time divided by the first contender's in the same round, per image if both
    report their number of images; None for the first. images: source images per call. peak_mib, check: None if not
    measured. inexact: it computes another function, or at lower precision, as its note says.
    """

    name: str
    role: Role
    time_ms: Spread
    ratio: Spread | None
    images: int | None
    peak_mib: float | None
    check: Check | None
    inexact: bool
    note: str

    @property
    def images_per_second(self) -> float | None:
        return None if self.images is None else 1e3 * self.images / self.time_ms.median

    @property
    def spread(self) -> float:
        """Interquartile range of the ratio divided by its median; 0 for the first contender."""
        return (self.ratio.upper - self.ratio.lower) / self.ratio.median if self.ratio else 0.0


@dataclass(frozen=True)
class Result:
    """Result of one benchmark on one device.

    device: "CPU", or the GPU's short name. machine: processor, cores, threads and torch version. setup: all that is
    known about the machine, the packages and the commit; equal setups share a footnote. source: name of the file.
    contenders: the first contender, then the others, fastest first. readme_task: title of its row in the README, or "".
    """

    group: str
    name: str
    sizes: tuple[tuple[str, str], ...]
    device: str
    commit: str
    machine: str
    setup: str
    source: str
    rounds: int
    contenders: tuple[Contender, ...]
    missing: Mapping[str, str]
    readme_task: str

    @property
    def first(self) -> Contender:
        return self.contenders[0]

    @property
    def alternatives(self) -> list[Contender]:
        return [each for each in self.contenders if each.role is Role.ALTERNATIVE]

    @property
    def size(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.sizes)

    @property
    def benchmark_id(self) -> tuple[str, str, str]:
        """Identifies the benchmark, whatever the device."""
        return self.group, self.name, self.size


def pluralize(number: int | None, noun: str) -> str:
    return f"{'?' if number is None else number} {noun}{'' if number == 1 else 's'}"


def format_number(value: float) -> str:
    """Format with three significant digits, without an exponent from 0.001 up."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-3 else f"{value:.1g}"


def is_pytest_benchmark_json(page: object) -> bool:
    return isinstance(page, dict) and {"machine_info", "commit_info", "datetime", "benchmarks"} <= page.keys()


def find_result_files(folder: Path) -> list[Path]:
    """Return the JSON files in a folder that pytest-benchmark has written, skipping other measurements."""
    return [file for file in sorted(folder.glob("*.json")) if is_pytest_benchmark_json(json.loads(file.read_text()))]


def read_results(files: Iterable[str | Path]) -> tuple[list[Result], list[str]]:
    """Return the results in these files, and one line for each file some of whose benchmarks are left out."""
    results: list[Result] = []
    left_out: list[str] = []
    for file in map(Path, files):
        try:
            page = json.loads(file.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{file}: {error.strerror if isinstance(error, OSError) else 'not a JSON file'}") from error
        if not is_pytest_benchmark_json(page):
            raise UserError(f"{file}: expected a file written by `pytest benchmarks --benchmark-json=FILE`")
        with_contenders = [each for each in page["benchmarks"] if "milliseconds" in each["extra_info"]]
        results += [_result(each, page, file.name) for each in with_contenders]
        if without := len(page["benchmarks"]) - len(with_contenders):
            left_out.append(f"{file.name}: left out {pluralize(without, 'benchmark')} without contenders")
    return results, left_out


def _result(benchmark: dict[str, Any], page: dict[str, Any], source: str) -> Result:
    info, commit_info = benchmark["extra_info"], page["commit_info"]
    commit = (commit_info.get("id") or "unknown")[:7] + (" + changes" if commit_info.get("dirty") else "")
    first, *others = (_contender(name, info) for name in info["milliseconds"])
    machine, packages = _machine(page["machine_info"], info["device"])
    return Result(
        group=benchmark["group"] or benchmark["name"],
        name=benchmark["name"],
        sizes=tuple((name, str(value)) for name, value in info["sizes"].items()),
        device="CPU" if info["device"] == "cpu" else info["device"].removeprefix("NVIDIA "),
        commit=commit,
        machine=f"{machine}; torch {page['machine_info'].get('packages', {}).get('torch', 'unknown')}",
        setup=f"{machine}; {packages}; commit {commit}; {page['datetime'][:10]}",
        source=source,
        rounds=info["rounds"],
        contenders=(first, *sorted(others, key=lambda each: each.ratio.median if each.ratio else 0.0)),
        missing=info.get("missing", {}),
        readme_task=info.get("readme_task", ""),
    )


def _contender(name: str, info: dict[str, Any]) -> Contender:
    first = next(iter(info["milliseconds"]))
    images = info.get("images", {})
    ratio, role = None, Role.FIRST
    if name != first:
        # The suite compares the times of calls; only here is a ratio converted to one per image.
        scale = images[first] / images[name] if {first, name} <= images.keys() else 1.0
        ratio = Spread(**{each: scale * value for each, value in info["speedup"][name].items()})
        roles = {"references": Role.REFERENCE, "experiments": Role.EXPERIMENT, "variants": Role.VARIANT}
        role = next((role for key, role in roles.items() if name in info.get(key, ())), Role.ALTERNATIVE)
    check = info.get("checks", {}).get(name)
    return Contender(
        name=name,
        role=role,
        time_ms=Spread(**info["milliseconds"][name]),
        ratio=ratio,
        images=images.get(name),
        peak_mib=info.get("peak_mib", {}).get(name),
        check=Check(**check) if check else None,
        inexact=name in info.get("inexact", ()),
        note=info.get("notes", {}).get(name, ""),
    )


def _machine(info: Mapping[str, Any], device: str) -> tuple[str, str]:
    """Return the processor with its cores and threads, and the versions of Python and the packages."""
    cpu = info.get("cpu", "unknown CPU")
    cores, threads = pluralize(info.get("cores"), "core"), pluralize(info.get("torch_threads"), "thread")
    versions = {"Python": info.get("python", "unknown")} | info.get("packages", {})
    return (
        f"{cpu if device == 'cpu' else f'{device}, on {cpu}'}; {cores}, {threads}",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version != "not installed"),
    )
