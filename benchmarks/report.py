"""Tables and charts of what `pytest benchmarks --benchmark-json=FILE` has measured, on one device or on several.

    python -m benchmarks.report FILE... --output DIR                 # report.md, and a chart of each group
    python -m benchmarks.report [FILE...] --readme README.md [--check]

Without a FILE: those in benchmarks/results. Exit code 1: the README is out of date; 2: a user mistake, in one line
on stderr.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks import charts
from benchmarks.measured import TOO_WIDE, Contender, Kind, Measured, Mistake, committed, counted, number, read
from benchmarks.suite import Spread

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

INTRODUCTION = f"""# Benchmarks

The contenders of a table were timed in turn, one call of each a round. "Times ours": how many times as long one takes
as ours (the first, in bold) in the same round, the median of the rounds and their quartiles; per image, where calls
take different numbers of them. **Below 1 it is faster than ours.** The spread is the distance of these quartiles over
the median. Above {TOO_WIDE:.0%} it is marked ⚠: the machine was not quiet, or the contender is not steady, and its
figure is worth no more than its quartiles say. "Check": that a contender computes the same function as the first, after
it was timed; what was compared, the error and its bound. "On" says the device, and its number what else it was measured
on.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]


def quartiles(spread: Spread) -> str:
    return f"{number(spread.median)} ({number(spread.lower)} to {number(spread.upper)})"


def footnotes(measured: Iterable[Measured]) -> dict[str, int]:
    """Numbers from 1, in order of first use."""
    return {setup: n for n, setup in enumerate(dict.fromkeys(each.setup for each in measured), 1)}


def together(measured: Sequence[Measured], key: Callable[[Measured], object]) -> list[list[Measured]]:
    """Those of one key, in order of the first of each."""
    found: dict[object, list[Measured]] = {}
    for each in measured:
        found.setdefault(key(each), []).append(each)
    return list(found.values())


def report(measured: Sequence[Measured], left_out: Sequence[str]) -> str:
    numbers = footnotes(measured)
    lines = [INTRODUCTION, *(f"{line}.\n" for line in left_out), "## Where we lose", "", *losses(measured, numbers), ""]
    lines += ["## Measured on", "", *(f"{n}. {setup}" for setup, n in numbers.items())]
    for group in together(measured, lambda each: each.group):
        lines += ["", f"## {group[0].group}", "", f"![{group[0].group}]({charts.file_name(group[0].group)})"]
        for same in together(group, lambda each: each.key):
            lines += ["", *section(same, numbers)]
    return "\n".join(lines) + "\n"


def losses(measured: Sequence[Measured], numbers: dict[str, int]) -> list[str]:
    lines = []
    for each in measured:
        for rival in each.rivals:
            if lost := lost_to(rival, each.first):
                where = f"{each.group}, {each.size}, {on(each, numbers)}"
                note = f"; {rival.note}" if rival.note else ""
                lines.append(f"- {where}: **{rival.name}** {', and '.join(lost)}{note}")
    return lines or ["No rival is faster than ours, or smaller, in anything measured here."]


def lost_to(rival: Contender, first: Contender) -> list[str]:
    """In what ours is slower or larger."""
    lost = []
    if rival.ratio and rival.ratio.median < 1:
        unsure = ", within the noise" if rival.ratio.upper >= 1 else ""
        lost.append(f"takes {quartiles(rival.ratio)} times as long as ours{unsure}")
    if rival.peak_mib is not None and first.peak_mib is not None and rival.peak_mib < first.peak_mib:
        lost.append(f"holds {number(rival.peak_mib)} MiB at most, ours {number(first.peak_mib)}")
    return lost


def on(measured: Measured, numbers: dict[str, int]) -> str:
    return f"{measured.device} [[{numbers[measured.setup]}]](#measured-on)"


def section(same: Sequence[Measured], numbers: dict[str, int]) -> list[str]:
    """One benchmark, on all devices."""
    with_images = any(each.images for measured in same for each in measured.contenders)
    head = ["on", "contender", "times ours (quartiles)", "spread", "ms (quartiles)", "images/s", "peak MiB", "check"]
    keep = [title for title in head if with_images or title != "images/s"]
    rows = [
        [cell for title, cell in zip(head, row(each, measured, numbers), strict=True) if title in keep]
        for measured in same
        for each in measured.contenders
    ]
    rounds = ", ".join(f"{counted(each.rounds, 'round')} on {on(each, numbers)} ({each.source})" for each in same)
    return [
        f"### {same[0].size or same[0].name}",
        "",
        f"{rounds}.",
        "",
        *table(keep, rows),
        *remarks(same, numbers),
    ]


def row(each: Contender, measured: Measured, numbers: dict[str, int]) -> list[str]:
    rate = each.images_per_second
    return [
        on(measured, numbers),
        f"**{each.name}**" if each.kind is Kind.FIRST else each.name,
        quartiles(each.ratio) if each.ratio else "1",
        f"**⚠ spread {each.spread:.0%}**" if each.spread > TOO_WIDE else f"{each.spread:.0%}" if each.ratio else "",
        quartiles(each.time_ms),
        "" if rate is None else number(rate),
        "" if each.peak_mib is None else number(each.peak_mib),
        same_function(each),
    ]


def same_function(each: Contender) -> str:
    """How a contender was found to compute the same function as the first, or why not."""
    if each.check:
        return f"{each.check.what}: {each.check.error:.1g} ≤ {each.check.bound:g}"
    if each.differs:
        return "**differs**, see below"
    return "other work" if each.kind is Kind.YARDSTICK else "the others are compared with it"


def remarks(same: Sequence[Measured], numbers: dict[str, int]) -> list[str]:
    lines = []
    for measured in same:
        where = f" ({on(measured, numbers)})" if len(same) > 1 else ""
        for each in measured.contenders:
            notes = [each.kind.value] * (each.kind is Kind.TRIED) + [each.note] * bool(each.note)
            lines += [f"- {each.name}{where}: {'; '.join(notes)}"] if notes else []
        lines += [f"- not here: {name}{where}: {why}" for name, why in measured.missing.items()]
    return ["", *lines] if lines else []


def summary(measured: Sequence[Measured]) -> str:
    """The README's table: a row a benchmark that is its headline and has rivals, and what it was measured on."""
    measured = [each for each in measured if each.headline and each.rivals]
    if not measured:
        return "(Nothing is measured yet that `benchmarks.report` can read.)"
    numbers = footnotes(measured)
    rows = [
        [
            f"{each.group}; {each.size}",
            f"{each.device} [{numbers[each.setup]}]",
            own_figure(each.first),
            others(each),
            memory(each),
        ]
        for each in measured
    ]
    head = ["", "on", "ours", "others' time over ours, the fastest first", "peak MiB: ours, the fastest other's"]
    marked = any(each.spread > TOO_WIDE for one in measured for each in one.contenders)
    warning = [f"⚠: the ratio's quartiles lie more than {TOO_WIDE:.0%} apart.", ""] if marked else []
    return "\n".join([*table(head, rows), "", *warning, *(f"[{n}] {setup}  " for setup, n in numbers.items())])


def own_figure(first: Contender) -> str:
    rate = first.images_per_second
    return f"{f'{number(first.time_ms.median)} ms' if rate is None else f'{number(rate)} images/s'} ({first.name})"


def others(measured: Measured) -> str:
    listed = {
        kind: "; ".join(times(each) for each in measured.contenders if each.kind is kind)
        for kind in (Kind.RIVAL, Kind.OURS, Kind.TRIED)
    }
    return "; ".join(each if kind is Kind.RIVAL else f"{kind.value}: {each}" for kind, each in listed.items() if each)


def times(other: Contender) -> str:
    assert other.ratio is not None
    figure = f"{number(other.ratio.median)}×{' ⚠' if other.spread > TOO_WIDE else ''}"
    lost = other.kind is Kind.RIVAL and other.ratio.median < 1
    return f"{other.name} {f'**{figure}**' if lost else figure}"


def memory(measured: Measured) -> str:
    known = [each.peak_mib for each in (measured.first, *measured.rivals[:1])]
    return ", ".join("?" if each is None else number(each) for each in known) if known[0] is not None else ""


def update_readme(path: Path, measured: Sequence[Measured], *, check: bool) -> int:
    try:
        text = path.read_text()
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Mistake(f"{path}: has no lines {BEGIN} and {END}")
    made = f"{before}{BEGIN}\n{summary(measured)}\n{END}{after}"
    if check:
        print(f"{path}: {'as measured' if made == text else 'out of date: run python -m benchmarks.report --readme'}")
        return int(made != text)
    path.write_text(made)
    return 0


def write_report(folder: Path, measured: Sequence[Measured], left_out: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for group in together(measured, lambda each: each.group):
        charts.draw(group, folder / charts.file_name(group[0].group))
    (folder / "report.md").write_text(report(measured, left_out))
    print(folder / "report.md")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """In one line, without argparse's usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="(default: those in benchmarks/results)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write report.md and its charts there")
    parser.add_argument("--readme", type=Path, metavar="README.md", help="write the table between its two marker lines")
    parser.add_argument(
        "--check", action="store_true", help="with --readme: write nothing, exit with 1 if it would differ"
    )
    asked = parser.parse_args(arguments)
    if not (asked.output or asked.readme):
        parser.error("say what to make: --output or --readme")
    if asked.check and not asked.readme:
        parser.error("--check goes with --readme")
    try:
        measured, left_out = read(asked.files or committed(RESULTS))
        if not measured and not asked.readme:
            raise Mistake("; ".join(left_out) or "no benchmark in these files")
        code = 0
        if asked.output:
            write_report(asked.output, measured, left_out)
        if asked.readme:
            code = update_readme(asked.readme, measured, check=asked.check)
        for line in left_out:
            print(line)
        return code
    except Mistake as mistake:
        parser.error(str(mistake))


if __name__ == "__main__":
    sys.exit(main())
