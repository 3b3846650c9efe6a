"""Charts as SVG, drawn by matplotlib. Colors are replaced by variables of page.css; text uses the page's font."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from fastsimclr.reporting.curves import Curve, Floats, reduce
from fastsimclr.reporting.numbers import number, percent

COLORS = ("#0072b2", "#d55e00", "#008a63", "#b5467f", "#9a6b00", "#2f95c9", "#5b5e66", "#6f52b5")
DASHES = ("", "7 4", "2 4", "10 4 2 4", "4 3")
"""Color and dash pattern of a run, by its index. 8 and 5 are coprime, so that 40 runs differ in at least one."""
INK, GRID, PAPER, REST = "#5c6066", "#ebebe6", "#fcfcfa", "#d9dcdd"
VARIABLES = {f"--c{k}": color for k, color in enumerate(COLORS)} | {
    "--soft": INK,
    "--grid": GRID,
    "--paper": PAPER,
    "--rest": REST,
}
"""The variables of page.css, each with a light and a dark value, that replace the colors in the SVG."""
WIDTH, HEIGHT = 480, 250  # in points: units of the SVG, about a pixel each
LEFT, RIGHT, TOP, BOTTOM = 48, 468, 8, 204  # edges of the plot area
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.ymargin": 0.04,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "lines.scale_dashes": False,
}


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    name: str
    index: int
    """Index of the run, which determines color and dash."""
    curve: Curve
    smooth: bool = False
    dots: bool = False
    error: Floats | None = None
    """Half the height of the error bars, (P,), in the unit of y."""


@dataclass(frozen=True)
class Chart:
    """A chart for page.html. data: the values that page.js shows under the pointer."""

    title: str
    unit: str
    svg: Markup
    data: dict[str, Any]
    note: str = ""
    shares: dict[str, float] = field(default_factory=dict)
    """Fraction of each part, for a share chart."""


def line_chart(
    title: str,
    unit: str,
    x_unit: str,
    lines: Sequence[Line],
    *,
    untrained: dict[int, float] | None = None,
    chance: Sequence[float] = (),
    from_zero: bool = False,
    note: str = "",
) -> Chart | None:
    """Draw curves over one axis. Behind a smoothed line, its values are drawn faint.

    untrained: reference values, by the index of their run. chance: reference values of all runs.
    """
    lines = [line for line in lines if len(line.curve.y)]
    if not lines:
        return None
    left, right = min(line.curve.ends[0] for line in lines), max(line.curve.ends[1] for line in lines)
    figure = Figure()
    with _axes(figure, x_unit, (left, right)) as axes:
        for line in lines:
            curve, color = line.curve, COLORS[line.index % len(COLORS)]
            if curve.points_per_bin > 1:
                axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
            elif line.smooth:
                axes.plot(curve.x, curve.y, color=color, alpha=0.33, linewidth=1)
            if line.error is not None:
                low, high = np.maximum(curve.y - line.error, 0), curve.y + line.error
                axes.vlines(curve.x, low, high, color=color, alpha=0.45, linewidth=1.5)
        for line in lines:
            color, dash = COLORS[line.index % len(COLORS)], DASHES[line.index % len(DASHES)]
            y = line.curve.smooth if line.smooth else line.curve.y
            style = (0, tuple(map(float, dash.split()))) if dash else "-"
            axes.plot(line.curve.x, y, color=color, linewidth=2, linestyle=style, gid="line")
            if line.dots or len(y) == 1:
                axes.plot(line.curve.x, y, "o", color=color, markerfacecolor=PAPER, markeredgewidth=2, clip_on=False)
        for index, level in (untrained or {}).items():
            axes.axhline(level, color=COLORS[index % len(COLORS)], linewidth=1.5, linestyle=(0, (1.5, 3)))
            if len(lines) == 1:
                axes.text(1, level, "untrained", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
        for level in chance:
            axes.axhline(level, color=INK, linewidth=1, linestyle=(0, (6, 3)))
        if from_zero and axes.dataLim.y0 >= 0:
            axes.set_ylim(bottom=0)
        for level in chance:
            has_room_below = level > 0.1 * axes.get_ylim()[1]
            axes.annotate(
                f"chance {number(level)} {unit}",
                (0.5, level),
                (0, -4 if has_room_below else 3),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                ha="center",
                va="top" if has_room_below else "bottom",
            )
    described = "; ".join(f"{line.name}: {_described(line.curve, unit)}" for line in lines)
    described += "".join(f"; chance: {number(level)} {unit}" for level in chance)
    parts = [(line.name, f"--c{line.index % len(COLORS)}", line.curve.x, line.curve.y) for line in lines]
    return Chart(
        title,
        unit,
        _svg(figure, title, f"{title} in {unit} by {x_unit}. {described}"),
        _data(unit, x_unit, (left, right), parts),
        note,
    )


def share_chart(
    title: str, x_unit: str, x: Floats, parts: dict[str, Floats], overall: dict[str, float]
) -> Chart | None:
    """Draw parts, (N,) each, as stacked areas that add up to 100 %. overall: each part's fraction, for the legend."""
    sums = sum(parts.values(), np.zeros_like(x))
    known = np.isfinite(sums) & (sums > 0)
    if not known.any():
        return None
    total = reduce(x[known], sums[known])
    shares = {name: 100 * reduce(x[known], part[known]).y / total.y for name, part in parts.items()}
    colors = stage_colors(list(parts))
    figure = Figure()
    with _axes(figure, x_unit, total.ends) as axes:
        axes.stackplot(total.x, *shares.values(), colors=[VARIABLES[colors[name]] for name in shares], linewidth=0)
        axes.set_ylim(0, 100)
    described = ", ".join(f"{name.replace('_', ' ')} {percent(share)}" for name, share in overall.items())
    lines = [(name.replace("_", " "), colors[name], total.x, share) for name, share in shares.items()]
    return Chart(
        title,
        "% of a step",
        _svg(figure, title, f"{title} in percent of a step by {x_unit}. Of all steps: {described}"),
        _data("%", x_unit, total.ends, lines),
        shares=overall,
    )


def stage_colors(names: Sequence[str]) -> dict[str, str]:
    """The color variable of each stage: data wait is highlighted, unmeasured time is gray."""
    colors = {"data_wait": "--c1", "compute": "--rest", "other": "--rest"}
    others = [name for name in names if name not in colors]
    return colors | {name: ("--c0", "--c2", "--c7", "--c4", "--c3", "--c5")[k % 6] for k, name in enumerate(others)}


@contextmanager
def _axes(figure: Figure, x_unit: str, ends: tuple[float, float]) -> Iterator[Axes]:
    """Create axes in the common style, with the x limits `ends`."""
    with matplotlib.rc_context(STYLE):
        figure.set_size_inches(WIDTH / 72, HEIGHT / 72)
        figure.patch.set_visible(False)
        size = ((RIGHT - LEFT) / WIDTH, (BOTTOM - TOP) / HEIGHT)
        axes = figure.add_axes((LEFT / WIDTH, 1 - BOTTOM / HEIGHT, *size))
        axes.set_xlabel(x_unit, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        yield axes
        axes.set_xlim(ends[0], ends[1] if ends[1] > ends[0] else ends[0] + 1)
        for axis in (axes.xaxis, axes.yaxis):
            if max(axis.get_view_interval()) >= 1e4:
                axis.set_major_formatter(EngFormatter(sep=""))  # 250k


def _svg(figure: Figure, title: str, label: str) -> Markup:
    """Return the figure as an SVG element. label: a description for screen readers."""
    file = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):  # unique ids within the page
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue().split("</defs>", 1)[1]  # drops a <style> that would apply to the whole page
    text = text.replace(' id="line"', ' class="line"')
    for unused in (
        r'font(-size|-family)?: [^;"]*; ',
        r' transform="rotate\(-0[^"]*"',
        r'(?<=<g) id="[^"]*"',
        r"(?<=>)\s+",
    ):
        text = re.sub(unused, "", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+|\s+", lambda m: m[1] or " ", path[0]), text)
    for variable, color in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    opened = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    return opened + Markup(text)


def _data(
    unit: str, x_unit: str, ends: tuple[float, float], lines: Sequence[tuple[str, str, Floats, Floats]]
) -> dict[str, Any]:
    return {
        "unit": "%" if unit == "%" else "",
        "x": x_unit,
        "ends": ends,
        "plot": (LEFT / WIDTH, RIGHT / WIDTH),
        "lines": [
            {"name": name, "color": color, "x": [float(f"{v:.7g}") for v in x], "y": [float(f"{v:.4g}") for v in y]}
            for name, color, x, y in lines
        ],
    }


def _described(curve: Curve, unit: str) -> str:
    first, last, low, high = (number(float(v)) for v in (curve.y[0], curve.y[-1], curve.low.min(), curve.high.max()))
    return f"from {first} to {last} {unit}, lowest {low}, highest {high}"
