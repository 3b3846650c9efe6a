"""A chart of each group of benchmarks: how long the others take beside ours, and what memory all hold."""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.measured import TOO_WIDE, Contender, Kind, Measured, number
from benchmarks.suite import Spread

# Okabe and Ito's, which color-blind readers can distinguish; the kinds differ in lightness, too.
COLORS = {
    Kind.FIRST: "#0072B2",
    Kind.OURS: "#56B4E9",
    Kind.TRIED: "#CC79A7",
    Kind.RIVAL: "#E69F00",
    Kind.YARDSTICK: "#BBBBBB",
}
AXIS_ENDS = 12.0  # a rival that takes longer gets a bar to the edge, and its figure: else the others are not visible
BAR_INCHES, PANEL_INCHES, WIDTH_INCHES = 0.3, 0.95, 11.0


def file_name(group: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", group.lower()).strip("-") + ".png"


def draw(group: Sequence[Measured], path: Path) -> None:
    """One panel a benchmark and device, below each other."""
    heights = [PANEL_INCHES + BAR_INCHES * len(each.contenders) for each in group]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(group[0].group, x=0.01, ha="left", fontweight="bold")
    kinds = [kind for kind in Kind if any(each.kind is kind for one in group for each in one.contenders)]
    handles = [Patch(color=COLORS[kind], label=kind.value) for kind in kinds]
    figure.legend(handles=handles, loc="upper right", ncols=len(kinds), frameon=False, fontsize=8)
    with_memory = any(each.peak_mib is not None for measured in group for each in measured.contenders)
    widths = [2.2, 1] if with_memory else [1]
    panels = figure.subplots(len(group), len(widths), squeeze=False, width_ratios=widths, height_ratios=heights)
    for measured, row in zip(group, panels, strict=True):
        ratios(row[0], measured)
        if with_memory:
            memory(row[1], measured.contenders)
    figure.savefig(path)


def bars(axes: Axes, contenders: Sequence[Contender], lengths: Sequence[float], labels: Sequence[str]) -> None:
    """From the top down."""
    rows = range(len(contenders))
    axes.barh(rows, lengths, color=[COLORS[each.kind] for each in contenders], height=0.7)
    axes.set_yticks(rows, labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)


def annotate(axes: Axes, ends: Sequence[float], labels: Sequence[str]) -> None:
    """A figure at each bar's end."""
    for row, (end, label) in enumerate(zip(ends, labels, strict=True)):
        axes.annotate(label, (end, row), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.35 * max([*ends, 1e-9]))  # room for the figures


def ratios(axes: Axes, measured: Measured) -> None:
    found = [each.ratio or Spread(1.0, 1.0, 1.0) for each in measured.contenders]
    edge = 1.15 * max(ratio.upper for ratio in found if ratio.upper <= AXIS_ENDS or ratio.median == 1)
    beyond = [ratio.upper > edge for ratio in found]
    lengths = [edge if out else ratio.median for ratio, out in zip(found, beyond, strict=True)]
    bars(axes, measured.contenders, lengths, [each.name for each in measured.contenders])
    annotate(
        axes,
        [min(edge, ratio.upper) for ratio in found],
        [
            figure_of(each) + (" (beyond the axis)" if out else "")
            for each, out in zip(measured.contenders, beyond, strict=True)
        ],
    )
    for row, (ratio, out) in enumerate(zip(found, beyond, strict=True)):
        if row and not out:
            axes.plot([ratio.lower, ratio.upper], [row, row], color="black", linewidth=1.2, marker="|")
    axes.axvline(1, color=COLORS[Kind.FIRST], linewidth=1, linestyle=":", zorder=0)
    axes.set_xlabel("times as long as ours takes; median, quartiles", fontsize=8)
    title = f"{measured.size}\n{measured.device}, commit {measured.commit}"
    axes.set_title(title, fontsize=9, loc="left")


def figure_of(each: Contender) -> str:
    if each.ratio is None:
        rate = each.images_per_second
        return f"{number(each.time_ms.median)} ms" if rate is None else f"{number(rate)} images/s"
    return f"{number(each.ratio.median)}×" + (f", spread {each.spread:.0%}" if each.spread > TOO_WIDE else "")


def memory(axes: Axes, contenders: Sequence[Contender]) -> None:
    lengths = [each.peak_mib or 0.0 for each in contenders]
    bars(axes, contenders, lengths, ["" for _ in contenders])
    annotate(axes, lengths, ["" if each.peak_mib is None else number(each.peak_mib) for each in contenders])
    axes.set_xlabel("peak memory, MiB", fontsize=8)
    if all(each.peak_mib is None for each in contenders):
        axes.set_axis_off()
