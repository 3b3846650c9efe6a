"""Whether we have become slower: the same benchmark of two runs, each by its ratios to the rivals of its own run."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measured import Kind, Measured, Mistake, counted

RULE = (
    "A rival's ratio is its time over ours in the same run, so that the machine's speed cancels. We have regressed "
    "where a ratio has fallen by more than the factor, base / new > FACTOR, and the quartiles of both runs do not "
    "overlap (where they do, it is within the noise); or where our peak memory has grown by more than the factor and "
    "by 1 MiB. Compared is what has the same name, sizes, device and number of threads in both."
)
REGRESSED, IN_NOISE, FINE = "REGRESSED", "within the noise", "ok"
LEAST_MIB = 1.0  # below, a factor says nothing


@dataclass(frozen=True)
class Comparison:
    """figure: "rival: NAME" or "our peak MiB"; change: how many times worse."""

    benchmark: str
    figure: str
    base: str
    new: str
    change: float
    verdict: str


def compare(base: Sequence[Measured], new: Sequence[Measured], factor: float) -> list[Comparison]:
    known = {identity(each): each for each in base}
    common = [(known[identity(each)], each) for each in new if identity(each) in known]
    if not common:
        raise Mistake(f"no benchmark in common: the base has {listed(base)}; the new one {listed(new)}")
    return [comparison for pair in common for comparison in compared(*pair, factor)]


def identity(measured: Measured) -> tuple[object, ...]:
    return (*measured.key, measured.setup.device, measured.setup.threads)


def listed(measured: Sequence[Measured]) -> str:
    """The names on each device, shortened: it goes into one line."""
    found = sorted({f"{each.name} ({each.setup.device}, {counted(each.setup.threads, 'thread')})" for each in measured})
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "") or "none"


def compared(base: Measured, new: Measured, factor: float) -> list[Comparison]:
    found = []
    title = f"{new.group}: {new.size}"
    before = {each.name: each for each in base.contenders}
    for now in new.contenders:
        then = before.get(now.name)
        if now.kind in (Kind.FIRST, Kind.OURS) or then is None or then.ratio is None or now.ratio is None:
            continue
        change = then.ratio.median / now.ratio.median
        verdict = FINE
        if change > factor:
            verdict = REGRESSED if now.ratio.upper < then.ratio.lower else IN_NOISE
        found.append(Comparison(title, f"rival: {now.name}", str(then.ratio), str(now.ratio), change, verdict))
    then_mib, now_mib = base.first.peak_mib, new.first.peak_mib
    if then_mib is not None and now_mib is not None:
        grown = now_mib > factor * then_mib and now_mib > then_mib + LEAST_MIB
        change = now_mib / then_mib if then_mib else 1.0 if not now_mib else float("inf")
        verdict = REGRESSED if grown else FINE
        found.append(Comparison(title, "our peak MiB", f"{then_mib:.1f}", f"{now_mib:.1f}", change, verdict))
    return found


def table(comparisons: Sequence[Comparison]) -> str:
    rows = [("benchmark", "figure", "base (quartiles)", "new (quartiles)", "times worse", "")]
    rows += [
        (each.benchmark, each.figure, each.base, each.new, f"{each.change:.2f}", each.verdict) for each in comparisons
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def in_one_only(base: Sequence[Measured], new: Sequence[Measured]) -> list[str]:
    """What could not be compared, one line each."""
    before, now = rivals(base), rivals(new)
    lines = [f"only in the base: {each}" for each in before if each not in now]
    return lines + [f"only in the new run: {each}" for each in now if each not in before]


def rivals(run: Sequence[Measured]) -> dict[str, None]:
    return {
        f"{each.name} ({each.size}; {each.setup.device}, {counted(each.setup.threads, 'thread')}), {rival.name}": None
        for each in run
        for rival in each.contenders
        if rival.kind not in (Kind.FIRST, Kind.OURS)
    }


def versions_changed(base: Sequence[Measured], new: Sequence[Measured]) -> list[str]:
    """A ratio changes with the versions of either side: what differs, one line each."""
    before = {pair for each in base for pair in each.setup.packages}
    now = {pair for each in new for pair in each.setup.packages}
    names = sorted({name for name, _ in before ^ now})
    return [f"other versions of {name}: {versions(before, name)} -> {versions(now, name)}" for name in names]


def versions(packages: set[tuple[str, str]], name: str) -> str:
    return ", ".join(sorted(version for each, version in packages if each == name)) or "not installed"
