"""One chart per group of benchmarks: time relative to fastsimclr, and peak memory."""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.benchmark_json import WIDE_SPREAD, Contender, Result, Role, format_number
from benchmarks.suite import Spread

# The Okabe-Ito palette, which color-blind readers can distinguish; the colors differ in lightness, too.
COLORS = {
    Role.FIRST: "#0072B2",
    Role.VARIANT: "#56B4E9",
    Role.EXPERIMENT: "#CC79A7",
    Role.ALTERNATIVE: "#E69F00",
    Role.REFERENCE: "#BBBBBB",
}
AXIS_LIMIT = 12.0  # longer bars are clipped, or the others would not be visible
BAR_INCHES, PANEL_INCHES, WIDTH_INCHES = 0.3, 0.95, 11.0


def file_name(group: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", group.lower()).strip("-") + ".png"


def write_chart(group: Sequence[Result], path: Path) -> None:
    """Draw one panel for each benchmark and device, one below the other."""
    heights = [PANEL_INCHES + BAR_INCHES * len(each.contenders) for each in group]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(group[0].group, x=0.01, ha="left", fontweight="bold")
    roles = [role for role in Role if any(each.role is role for result in group for each in result.contenders)]
    handles = [Patch(color=COLORS[role], label=role.value) for role in roles]
    figure.legend(handles=handles, loc="upper right", ncols=len(roles), frameon=False, fontsize=8)
    with_memory = any(each.peak_mib is not None for result in group for each in result.contenders)
    widths = [2.2, 1] if with_memory else [1]
    panels = figure.subplots(len(group), len(widths), squeeze=False, width_ratios=widths, height_ratios=heights)
    for result, row in zip(group, panels, strict=True):
        draw_ratios(row[0], result)
        if with_memory:
            draw_memory(row[1], result.contenders)
    figure.savefig(path)


def draw_bars(axes: Axes, contenders: Sequence[Contender], lengths: Sequence[float], labels: Sequence[str]) -> None:
    """Draw horizontal bars, the first at the top."""
    rows = range(len(contenders))
    axes.barh(rows, lengths, color=[COLORS[each.role] for each in contenders], height=0.7)
    axes.set_yticks(rows, labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)


def annotate(axes: Axes, ends: Sequence[float], labels: Sequence[str]) -> None:
    """Write a label at the end of each bar."""
    for row, (end, label) in enumerate(zip(ends, labels, strict=True)):
        axes.annotate(label, (end, row), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.35 * max([*ends, 1e-9]))  # room for the labels


def draw_ratios(axes: Axes, result: Result) -> None:
    ratios = [each.ratio or Spread(1.0, 1.0, 1.0) for each in result.contenders]
    edge = 1.15 * max(ratio.upper for ratio in ratios if ratio.upper <= AXIS_LIMIT or ratio.median == 1)
    clipped = [ratio.upper > edge for ratio in ratios]
    lengths = [edge if clip else ratio.median for ratio, clip in zip(ratios, clipped, strict=True)]
    draw_bars(axes, result.contenders, lengths, [each.name for each in result.contenders])
    annotate(
        axes,
        [min(edge, ratio.upper) for ratio in ratios],
        [
            ratio_label(each) + (" (bar clipped)" if clip else "")
            for each, clip in zip(result.contenders, clipped, strict=True)
        ],
    )
    for row, (ratio, clip) in enumerate(zip(ratios, clipped, strict=True)):
        if row and not clip:
            axes.plot([ratio.lower, ratio.upper], [row, row], color="black", linewidth=1.2, marker="|")
    axes.axvline(1, color=COLORS[Role.FIRST], linewidth=1, linestyle=":", zorder=0)
    axes.set_xlabel("time relative to fastsimclr, median and quartiles", fontsize=8)
    title = f"{result.size}\n{result.device}, commit {result.commit}"
    axes.set_title(title, fontsize=9, loc="left")


def ratio_label(each: Contender) -> str:
    if each.ratio is None:
        rate = each.images_per_second
        return f"{format_number(each.time_ms.median)} ms" if rate is None else f"{format_number(rate)} images/s"
    return f"{format_number(each.ratio.median)}×" + (f", spread {each.spread:.0%}" if each.spread > WIDE_SPREAD else "")


def draw_memory(axes: Axes, contenders: Sequence[Contender]) -> None:
    lengths = [each.peak_mib or 0.0 for each in contenders]
    draw_bars(axes, contenders, lengths, ["" for _ in contenders])
    annotate(axes, lengths, ["" if each.peak_mib is None else format_number(each.peak_mib) for each in contenders])
    axes.set_xlabel("peak memory (MiB)", fontsize=8)
    if all(each.peak_mib is None for each in contenders):
        axes.set_axis_off()
