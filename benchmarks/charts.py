"""A chart of each group of benchmarks: how long the others take beside ours, and what memory all hold."""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.measured import TOO_WIDE, Contender, Kind, Measured

# Okabe and Ito's, which the colour-blind tell apart; the kinds differ in lightness, too.
COLOURS = {Kind.FIRST: "#0072B2", Kind.OURS: "#56B4E9", Kind.RIVAL: "#E69F00", Kind.YARDSTICK: "#BBBBBB"}
AXIS_ENDS = 12.0  # a rival that takes longer gets a bar to the edge, and its figure: else the others are not seen
BAR_INCHES, PANEL_INCHES, WIDTH_INCHES = 0.3, 0.95, 11.0


def file_name(group: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", group.lower()).strip("-") + ".png"


def draw(group: Sequence[Measured], path: Path) -> None:
    """One panel a benchmark and device, below each other."""
    heights = [PANEL_INCHES + BAR_INCHES * len(each.contenders) for each in group]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(group[0].group, x=0.01, ha="left", fontweight="bold")
    with_memory = any(each.peak_mib is not None for measured in group for each in measured.contenders)
    widths = [2.2, 1] if with_memory else [1]
    panels = figure.subplots(len(group), len(widths), squeeze=False, width_ratios=widths, height_ratios=heights)
    for measured, row in zip(group, panels, strict=True):
        ratios(row[0], measured)
        if with_memory:
            memory(row[1], measured.contenders)
    figure.savefig(path)


def bars(axes: Axes, contenders: Sequence[Contender], lengths: Sequence[float], labels: Sequence[str]) -> None:
    """From the top down, each with its figure behind it."""
    rows = range(len(contenders))
    axes.barh(rows, lengths, color=[COLOURS[each.kind] for each in contenders], height=0.7)
    for row, length, label in zip(rows, lengths, labels, strict=True):
        axes.annotate(label, (length, row), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(rows, ["" for _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.3 * max([*lengths, 1e-9]))  # room for the figures
    axes.spines[["top", "right"]].set_visible(False)


def ratios(axes: Axes, measured: Measured) -> None:
    contenders = measured.contenders
    shown = [each.ratio for each in contenders if each.ratio and each.ratio.upper <= AXIS_ENDS]
    edge = 1.15 * max([1.0, *(ratio.upper for ratio in shown)])
    lengths, labels = [], []
    for each in contenders:
        beyond = each.ratio is not None and each.ratio.upper > edge
        lengths.append(edge if beyond else each.ratio.median if each.ratio else 1.0)
        labels.append(f"{figure_of(each)}{' (beyond the axis)' if beyond else ''}")
    bars(axes, contenders, lengths, labels)
    for row, (each, length, label) in enumerate(zip(contenders, lengths, axes.texts, strict=True)):
        if each.ratio and length < edge:
            axes.plot([each.ratio.lower, each.ratio.upper], [row, row], color="black", linewidth=1.2, marker="|")
            label.xy = (each.ratio.upper, row)  # behind the whisker
    axes.axvline(1, color=COLOURS[Kind.FIRST], linewidth=1, linestyle=":")
    axes.set_yticks(range(len(contenders)), [each.name for each in contenders], fontsize=9)
    axes.set_xlabel("times as long as ours takes; median, quartiles", fontsize=8)
    axes.set_title(f"{measured.size}\n{measured.setup.short}, commit {measured.setup.commit}", fontsize=9, loc="left")


def figure_of(each: Contender) -> str:
    if each.ratio is None:
        rate = each.images_per_second
        return f"{each.time_ms.median:.3g} ms" if rate is None else f"{rate:,.0f} images/s"
    wide = f", spread {each.spread:.0%}" if each.spread > TOO_WIDE else ""
    return f"{each.ratio.median:.3g}×{wide}"


def memory(axes: Axes, contenders: Sequence[Contender]) -> None:
    known = [each.peak_mib is not None for each in contenders]
    labels = [f"{each.peak_mib:,.0f}" if is_known else "" for each, is_known in zip(contenders, known, strict=True)]
    bars(axes, contenders, [each.peak_mib or 0.0 for each in contenders], labels)
    axes.set_xlabel("peak memory, MiB", fontsize=8)
    if not any(known):
        axes.set_axis_off()
