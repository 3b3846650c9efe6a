"""Charts as inline SVG that keep their text's size at any width: positions are in percent, and only curves stretch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsimclr.reporting.curves import Curve, Floats, reduce
from fastsimclr.reporting.markup import Child, Html, element
from fastsimclr.reporting.numbers import number, percent, tick_labels, ticks

COLOURS, DASHES = 8, 5  # of page.css; both differ from run to run, so that 40 runs can be told apart
SIDE = 1000  # of the square that curves are drawn in, stretched to the chart


@dataclass(frozen=True)
class Line:
    """A curve of a chart. place: of its run among those compared, which gives colour and dash."""

    name: str
    place: int
    curve: Curve
    smooth: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    y: float
    place: int


@dataclass(frozen=True)
class Axes:
    """The part of the plane that a chart shows."""

    left: float
    right: float
    low: float
    high: float

    def x(self, values: Floats) -> Floats:
        return SIDE * (values - self.left) / ((self.right - self.left) or 1.0)

    def y(self, values: Floats) -> Floats:
        return SIDE * (self.high - values) / ((self.high - self.low) or 1.0)

    def across(self, x: float) -> str:
        return f"{float(self.x(np.array(x))) / SIDE:.2%}"

    def down(self, y: float) -> str:
        return f"{float(self.y(np.array(y))) / SIDE:.2%}"


def style(place: int) -> str:
    """The classes of page.css that make a run's colour and dash."""
    return f"c{place % COLOURS} d{place % DASHES}"


def swatch(place: int) -> Html:
    """A short piece of a run's line, for legends and tables."""
    line = element("line", x1=0, x2=26, y1=5, y2=5, class_=f"line {style(place)}")
    return element("svg", line, class_="swatch", width=26, height=10, aria_hidden="true")


def line_chart(
    title: str,
    unit: str,
    x_unit: str,
    lines: Sequence[Line],
    *,
    levels: Sequence[Level] = (),
    from_zero: bool = False,
    note: str = "",
) -> Html:
    """Curves over one axis. Where a line is smooth, what it smooths is drawn faint behind it."""
    lines = [line for line in lines if len(line.curve.y)]
    if not lines:
        return Html("")
    values = np.concatenate([*([line.curve.low, line.curve.high] for line in lines)], axis=None)
    low, high = _range(np.append(values, [level.y for level in levels]), from_zero)
    axes = Axes(min(line.curve.ends[0] for line in lines), max(line.curve.ends[1] for line in lines), low, high)
    drawn: list[Child] = [_faint(axes, line) for line in lines]
    drawn += [_curve(axes, line) for line in lines]
    on_top: list[Child] = []
    for level in levels:
        y = axes.down(level.y)
        on_top.append(element("line", x1="0", x2="100%", y1=y, y2=y, class_=f"level c{level.place % COLOURS}"))
        if len(levels) == 1:
            on_top.append(element("text", level.name, x="100%", y=y, dy="-0.5em", class_="level-name"))
    for line in lines:
        if line.dots or len(line.curve.y) == 1:
            places = zip(line.curve.x, line.curve.y, strict=True)
            on_top += [
                element("circle", cx=axes.across(x), cy=axes.down(y), r=3, class_=f"dot c{line.place % COLOURS}")
                for x, y in places
            ]
    described = "; ".join(f"{line.name}: {_described(line.curve, unit)}" for line in lines)
    return _figure(
        title,
        unit,
        x_unit,
        axes,
        drawn,
        on_top,
        label=f"{title} in {unit} by {x_unit}. {described}",
        data=[(line.curve.x, line.curve.y) for line in lines],
        note=note,
    )


def share_chart(title: str, x_unit: str, x: Floats, parts: dict[str, Floats], overall: dict[str, float]) -> Html:
    """Parts, (N,) each, as areas one on another that fill the chart. overall: each part's share of the whole."""
    sums = sum(parts.values(), np.zeros_like(x))
    known = np.isfinite(sums) & (sums > 0)
    if not known.any():
        return Html("")
    total = reduce(x[known], sums[known])
    shares = {name: 100 * reduce(x[known], part[known]).y / total.y for name, part in parts.items()}
    axes = Axes(*total.ends, 0, 100)
    drawn: list[Child] = []
    below = np.zeros_like(total.y)
    for name, share in shares.items():
        above = below + share
        outline = _path(axes, np.append(total.x, total.x[::-1]), np.append(above, below[::-1])) + "Z"
        drawn.append(element("path", d=outline, class_=f"area {stage_style(name, list(parts))}", data_name=name))
        below = above
    described = ", ".join(f"{name.replace('_', ' ')} {percent(share)}" for name, share in overall.items())
    return _figure(
        title,
        "% of a step",
        x_unit,
        axes,
        drawn,
        [],
        label=f"{title} in percent of a step by {x_unit}. Of all steps: {described}",
        data=[(total.x, share) for share in shares.values()],
        legend=stage_legend(overall),
    )


def stage_style(name: str, names: Sequence[str]) -> str:
    """Waiting for data stands out, what has no name of its own does not, and the other stages are told apart."""
    fixed = {"data_wait": "stage-wait", "compute": "stage-rest", "other": "stage-rest"}
    if name in fixed:
        return fixed[name]
    return f"stage-{[other for other in names if other not in fixed].index(name) % 6}"


def stage_legend(shares: dict[str, float]) -> Html:
    return element(
        "ul",
        [
            element("li", element("i", class_=stage_style(name, list(shares))), name.replace("_", " "), " ",
                    element("b", percent(share)))
            for name, share in shares.items()
        ],
        class_="legend",
    )  # fmt: skip


def stage_bar(shares: dict[str, float]) -> Html:
    """One run's stages as a bar of a table."""
    parts = [
        element("i", class_=stage_style(name, list(shares)), style=f"width:{100 * share:.2f}%")
        for name, share in shares.items()
    ]
    return element("div", parts, class_="stack", aria_hidden="true")


def _range(values: NDArray[np.float64], from_zero: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if from_zero:
        low = min(low, 0.0)
    room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - room), high + room


def _described(curve: Curve, unit: str) -> str:
    first, last, low, high = (number(float(v)) for v in (curve.y[0], curve.y[-1], curve.low.min(), curve.high.max()))
    return f"from {first} to {last} {unit}, lowest {low}, highest {high}"


def _path(axes: Axes, x: Floats, y: Floats) -> str:
    return "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in zip(axes.x(x), axes.y(y), strict=True))


def _faint(axes: Axes, line: Line) -> Html | None:
    """What a smooth line smooths: each point, or from the lowest to the highest of each bin."""
    curve = line.curve
    colour = f"c{line.place % COLOURS}"
    if curve.steps_a_bin > 1:
        outline = _path(axes, np.append(curve.x, curve.x[::-1]), np.append(curve.high, curve.low[::-1])) + "Z"
        return element("path", d=outline, class_=f"band {colour}")
    if line.smooth:
        return element("path", d=_path(axes, curve.x, curve.y), class_=f"raw {colour}")
    return None


def _curve(axes: Axes, line: Line) -> Html:
    y = line.curve.smooth if line.smooth else line.curve.y
    return element("path", d=_path(axes, line.curve.x, y), class_=f"line {style(line.place)}", data_name=line.name)


def _figure(
    title: str,
    unit: str,
    x_unit: str,
    axes: Axes,
    drawn: Sequence[Child],
    on_top: Sequence[Child],
    *,
    label: str,
    data: Sequence[tuple[Floats, Floats]],
    note: str = "",
    legend: Child = None,
) -> Html:
    y_ticks = ticks(axes.low, axes.high)
    y_labels = tick_labels(y_ticks)
    grid: list[Child] = []
    for value, text in zip(y_ticks, y_labels, strict=True):
        y = axes.down(value)
        grid.append(element("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
        grid.append(element("text", text, x="-8", y=y, dy="0.33em", class_="y"))
    x_ticks = ticks(axes.left, axes.right, whole=True)
    for value, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = axes.across(value)
        grid.append(element("line", x1=x, x2=x, y1="100%", y2="100%", class_="tick"))
        grid.append(element("text", text, x=x, y="100%", dy="1.6em", class_="x"))
    grid.append(element("text", x_unit, x="100%", y="100%", dy="3em", class_="x-unit"))
    curves = element(
        "svg", drawn, viewBox=f"0 0 {SIDE} {SIDE}", preserveAspectRatio="none", width="100%", height="100%"
    )
    cursor = element("line", x1="0", x2="0", y1="0", y2="100%", class_="cursor", visibility="hidden")
    picture = element("svg", grid, curves, on_top, cursor, role="img", aria_label=label, class_="axes")
    # Numbers alone: nothing in them could end the script element.
    points = [[[_short(v, 7) for v in x], [_short(v, 4) for v in y]] for x, y in data]
    return element(
        "figure",
        element("figcaption", element("h3", title), element("span", unit, class_="unit")),
        legend,
        element("div", picture, class_="plot", style=f"--room:{max(map(len, y_labels), default=1)}ch"),
        element("p", note, class_="note") if note else None,
        element("script", Html(json.dumps(points, separators=(",", ":"))), type="application/json"),
        class_="chart",
        data_left=_short(axes.left, 7),
        data_right=_short(axes.right, 7),
        data_unit=unit.split()[0],
        data_x=x_unit,
    )


def _short(value: float, digits: int) -> float:
    shortened = float(f"{value:.{digits}g}")
    return int(shortened) if shortened == int(shortened) else shortened
