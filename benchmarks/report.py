"""Make tables and charts of what `pytest benchmarks --benchmark-json=FILE` has measured, on one or several devices.

    python -m benchmarks.report FILE... --output DIR                 # report.md and one chart per group
    python -m benchmarks.report [FILE...] --readme README.md [--check]

Without FILE, the files in benchmarks/results are read. Exit codes: 1 if the README is out of date; 2 for a user error,
reported as one line on stderr.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks import charts
from benchmarks.benchmark_json import (
    WIDE_SPREAD,
    Contender,
    Result,
    Role,
    UserError,
    find_result_files,
    format_number,
    pluralize,
    read_results,
)
from benchmarks.suite import Spread

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
DISADVANTAGES = "Where an alternative is faster or smaller"
README_ORDER = ("NT-Xent", "two augmented views of photos", "two augmented views", "training step", "LARS step")

INTRODUCTION = f"""# Benchmarks

The contenders in a table were timed in turn, one call of each per round.

- **Relative time**: the contender's time divided by that of fastsimclr (the first row, in bold) in the same round, as
  the median over the rounds with its quartiles. It is per image where calls process different numbers of images.
  **Below 1, the contender is faster than fastsimclr.**
- **Spread**: the interquartile range of the relative time divided by its median. Above {WIDE_SPREAD:.0%} it is
  marked ⚠: the machine was busy, or the contender's time varies, and the median is only a rough figure.
- **Check**: whether the contender computes the same result as the first row, tested after timing: what was compared,
  its error and the bound.
- **Device**: the device, with a link to the full setup.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]


def quartiles(spread: Spread) -> str:
    return f"{format_number(spread.median)} ({format_number(spread.lower)} to {format_number(spread.upper)})"


def footnotes(results: Iterable[Result]) -> dict[str, int]:
    """Number the setups from 1, in order of first use."""
    return {setup: n for n, setup in enumerate(dict.fromkeys(each.setup for each in results), 1)}


def group_by(results: Sequence[Result], key: Callable[[Result], object]) -> list[list[Result]]:
    """Group the results by key, in order of the first result of each group."""
    groups: dict[object, list[Result]] = {}
    for each in results:
        groups.setdefault(key(each), []).append(each)
    return list(groups.values())


def report(results: Sequence[Result], left_out: Sequence[str]) -> str:
    numbers = footnotes(results)
    lines = [INTRODUCTION, *(f"{line}.\n" for line in left_out), f"## {DISADVANTAGES}", ""]
    lines += [*disadvantages(results, numbers), ""]
    lines += ["## Setups", "", *(f"{n}. {setup}" for setup, n in numbers.items())]
    for group in group_by(results, lambda each: each.group):
        lines += ["", f"## {group[0].group}", "", f"![{group[0].group}]({charts.file_name(group[0].group)})"]
        for devices in group_by(group, lambda each: each.benchmark_id):
            lines += ["", *section(devices, numbers)]
    return "\n".join(lines) + "\n"


def disadvantages(results: Sequence[Result], numbers: dict[str, int]) -> list[str]:
    lines = []
    for each in results:
        for alternative in each.alternatives:
            if advantages := compare(alternative, each.first):
                where = f"{each.group}, {each.size}, {device_link(each, numbers)}"
                note = f"; {alternative.note}" if alternative.note else ""
                lines.append(f"- {where}: **{alternative.name}** {', and '.join(advantages)}{note}")
    return lines or ["No alternative is faster than fastsimclr, or needs less memory, in any of these benchmarks."]


def compare(alternative: Contender, first: Contender) -> list[str]:
    """Say in what the alternative is faster or smaller than the first contender."""
    advantages = []
    if alternative.ratio and alternative.ratio.median < 1:
        noise = ", within the noise" if alternative.ratio.upper >= 1 else ""
        advantages.append(f"takes {quartiles(alternative.ratio)} times as long as fastsimclr{noise}")
    if alternative.peak_mib is not None and first.peak_mib is not None and alternative.peak_mib < first.peak_mib:
        peaks = f"{format_number(alternative.peak_mib)} MiB, fastsimclr {format_number(first.peak_mib)} MiB"
        advantages.append(f"peaks at {peaks}")
    return advantages


def device_link(result: Result, numbers: dict[str, int]) -> str:
    return f"{result.device} [[{numbers[result.setup]}]](#setups)"


def section(devices: Sequence[Result], numbers: dict[str, int]) -> list[str]:
    """Write the section of one benchmark, measured on one or several devices."""
    with_images = any(each.images for result in devices for each in result.contenders)
    head = ["device", "contender", "relative time (quartiles)", "spread", "ms (quartiles)"]
    head += ["images/s", "peak MiB", "check"]
    columns = [title for title in head if with_images or title != "images/s"]
    rows = [
        [cell for title, cell in zip(head, row(each, result, numbers), strict=True) if title in columns]
        for result in devices
        for each in result.contenders
    ]
    rounds = ", ".join(
        f"{pluralize(each.rounds, 'round')} on {device_link(each, numbers)} ({each.source})" for each in devices
    )
    return [
        f"### {devices[0].size or devices[0].name}",
        "",
        f"{rounds}.",
        "",
        *table(columns, rows),
        *notes(devices, numbers),
    ]


def row(each: Contender, result: Result, numbers: dict[str, int]) -> list[str]:
    rate = each.images_per_second
    return [
        device_link(result, numbers),
        f"**{each.name}**" if each.role is Role.FIRST else each.name,
        quartiles(each.ratio) if each.ratio else "1",
        f"**⚠ {each.spread:.0%}**" if each.spread > WIDE_SPREAD else f"{each.spread:.0%}" if each.ratio else "",
        quartiles(each.time_ms),
        "" if rate is None else format_number(rate),
        "" if each.peak_mib is None else format_number(each.peak_mib),
        check_cell(each),
    ]


def check_cell(each: Contender) -> str:
    """Say how the contender's result was checked, or why it was not."""
    if each.check:
        return f"{each.check.what}: {each.check.error:.1g} ≤ {each.check.bound:g}"
    if each.inexact:
        return "**inexact**, see below"
    return "different work" if each.role is Role.REFERENCE else "the others are compared with it"


def notes(devices: Sequence[Result], numbers: dict[str, int]) -> list[str]:
    lines = []
    for result in devices:
        where = f" ({device_link(result, numbers)})" if len(devices) > 1 else ""
        for each in result.contenders:
            parts = [each.role.value] * (each.role is Role.EXPERIMENT) + [each.note] * bool(each.note)
            lines += [f"- {each.name}{where}: {'; '.join(parts)}"] if parts else []
        lines += [f"- not measured: {name}{where}: {why}" for name, why in result.missing.items()]
    return ["", *lines] if lines else []


def readme_table(results: Sequence[Result]) -> str:
    """Write the README's tables, one per machine, with a row for each benchmark that has a task title.

    The best alternative is the fastest one, even if it is inexact.
    """
    lines = []
    results = sorted((each for each in results if each.readme_task and each.alternatives), key=readme_position)
    for machine in group_by(results, lambda each: each.machine):
        lines += [f"Device: {machine[0].machine}.", ""]
        head = ["task", "fastsimclr", "best alternative", "times faster"]
        lines += [*table(head, (readme_row(each) for each in machine)), ""]
    best = [each.alternatives[0] for each in results]
    if any(each.ratio and each.ratio.median < 1 for each in best):
        lines += ["Below 1, the alternative is faster.", ""]
    if any(each.inexact for each in best):
        lines += ["† Inexact: it computes a different function, or at lower precision.", ""]
    if any(each.spread > WIDE_SPREAD for each in best):
        lines += [f"⚠ Noisy: the interquartile range is more than {WIDE_SPREAD:.0%} of the median.", ""]
    anchor = DISADVANTAGES.lower().replace(" ", "-")
    lines += [
        "All results, with quartiles, peak memory and versions: "
        "[benchmarks/results/report.md](benchmarks/results/report.md).",
        f"{DISADVANTAGES}: [list](benchmarks/results/report.md#{anchor}).",
    ]
    return "\n".join(lines)


def readme_position(result: Result) -> int:
    positions = (i for i, start in enumerate(README_ORDER) if result.readme_task.startswith(start))
    return next(positions, len(README_ORDER))


def readme_row(result: Result) -> list[str]:
    best = result.alternatives[0]
    assert best.ratio is not None
    return [
        result.readme_task,
        time_or_rate(result.first),
        f"{best.name}{' †' if best.inexact else ''}: {time_or_rate(best)}",
        f"{format_number(best.ratio.median)}{' ⚠' if best.spread > WIDE_SPREAD else ''}",
    ]


def time_or_rate(each: Contender) -> str:
    rate = each.images_per_second
    return f"{format_number(each.time_ms.median)} ms" if rate is None else f"{format_number(rate)} images/s"


def update_readme(path: Path, results: Sequence[Result], *, check: bool) -> int:
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path}: expected the lines {BEGIN} and {END}, found no such pair")
    updated = f"{before}{BEGIN}\n{readme_table(results)}\n{END}{after}"
    if check:
        up_to_date = updated == text
        print(f"{path}: {'up to date' if up_to_date else 'out of date: run python -m benchmarks.report --readme'}")
        return int(not up_to_date)
    path.write_text(updated)
    return 0


def write_report(folder: Path, results: Sequence[Result], left_out: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for group in group_by(results, lambda each: each.group):
        charts.write_chart(group, folder / charts.file_name(group[0].group))
    (folder / "report.md").write_text(report(results, left_out))
    print(folder / "report.md")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report the error in one line, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="(default: those in benchmarks/results)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write report.md and its charts to")
    parser.add_argument(
        "--readme", type=Path, metavar="README.md", help="file whose table to update, between two markers"
    )
    parser.add_argument("--check", action="store_true", help="with --readme: write nothing; exit with 1 if out of date")
    options = parser.parse_args(arguments)
    if not (options.output or options.readme):
        parser.error("got neither --output nor --readme, expected at least one of them")
    if options.check and not options.readme:
        parser.error("got --check without --readme: add --readme README.md")
    try:
        results, left_out = read_results(options.files or find_result_files(RESULTS))
        if not results and not options.readme:
            raise UserError("; ".join(left_out) or "got files without benchmarks")
        code = 0
        if options.output:
            write_report(options.output, results, left_out)
        if options.readme:
            code = update_readme(options.readme, results, check=options.check)
        for line in left_out:
            print(line)
        return code
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
