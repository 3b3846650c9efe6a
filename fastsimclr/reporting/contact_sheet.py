"""PNG pages of images and text, drawn on matplotlib axes whose data coordinates are pixels from the top left."""

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (height, width, 3)

DPI = 72  # one point, matplotlib's unit of fonts and lines, is one pixel; n / 72 * 72 is exactly n in floating point
FONT, TAG_FONT, HEAD_FONT, TITLE_FONT, LINE = 11.5, 10.5, 13.0, 18.0, 15
MARGIN, GAP = 20, 18
TAG = 14  # side of the square with a crop's number
INK, FAINT, RED = "#1c1c1e", "#636366", "#c8102e"
FRAME = "#c8c8c8"
COLORS = ("#ff453a", "#2f9bff", "#32d158", "#ffd60a", "#c77dff", "#ff9f0a", "#2ed9d9", "#ff7ac6")  # one per view


class Page:
    """A page to draw on; `png` sets its size. Positions are those of the top left corner, in pixels."""

    def __init__(self) -> None:
        self.figure = Figure(dpi=DPI)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()

    def image(self, x: int, y: int, pixels: Pixels, zoom: float = 1, *, frame: str = FRAME, thickness: int = 1) -> int:
        """Draw an image with a frame; returns the image's bottom. Pixels are interpolated only for zoom < 1."""
        height, width = (max(1, round(side * zoom)) for side in pixels.shape[:2])
        if zoom < 1:
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
        corner, sides = (x - thickness, y - thickness), (width + 2 * thickness, height + 2 * thickness)
        self._rectangle(corner, *sides, facecolor=frame, linewidth=0, zorder=-1)  # an outline could cover pixels
        self.axes.imshow(pixels, extent=(x, x + width, y + height, y), interpolation="nearest", aspect="auto")
        return y + height

    def text(
        self,
        x: float,
        y: int,
        lines: Iterable[str],
        size: float = FONT,
        weight: str = "normal",
        color: str = INK,
    ) -> int:
        """Draw lines of text; returns the y of the next line."""
        step = round(LINE * size / FONT)
        for line in lines:
            baseline = y + round(0.75 * step)  # align baselines: the tops of letters differ
            style: dict[str, Any] = {"size": size, "weight": weight, "color": color}
            self.axes.text(x, baseline, line, parse_math=False, **style)
            y += step
        return y

    def label(self, x: float, y: float, text: str) -> None:
        """Draw a word with a white halo, centered at x, y."""
        self._centered(x, y, text, FONT, INK).set_path_effects([withStroke(linewidth=3, foreground="white")])

    def dots(self, at: NDArray[np.float64], radius: float, colors: list[str], markers: list[str]) -> None:
        """Draw the points `at` (N, 2) of a scatter plot; within a marker, later points are on top."""
        for marker in dict.fromkeys(markers):
            selected = [k for k, each in enumerate(markers) if each == marker]
            style: dict[str, Any] = {"s": (2 * radius) ** 2, "edgecolors": "white", "linewidths": 0.4, "alpha": 0.8}
            self.axes.scatter(at[selected, 0], at[selected, 1], c=[colors[k] for k in selected], marker=marker, **style)

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str, str]]) -> None:
        """Draw a legend. entries: (color, marker, text) of each line."""
        handles = [Line2D([], [], color=color, marker=marker, linestyle="") for color, marker, _ in entries]
        legend = self.axes.legend(
            handles,
            ["class"] * len(entries),
            loc="upper left",
            bbox_to_anchor=(x, y),
            bbox_transform=self.axes.transData,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            labelspacing=0.7,
            handlelength=1.4,
            markerscale=1.8,
            fontsize=FONT,
            labelcolor=INK,
        )
        for drawn, (_, _, text) in zip(legend.get_texts(), entries, strict=True):
            drawn.set(text=text, parse_math=False)  # set afterwards: matplotlib hides labels that begin with "_"

    def heading(self, title: str, notes: list[list[str]], width: int) -> int:
        """Draw the title and the notes, lists of phrases, below it; returns the y of the content."""
        lines = [fitted(title, width, TITLE_FONT, "bold")]
        y = self.text(MARGIN, MARGIN, lines, TITLE_FONT, "bold") + 6
        for phrases in notes:
            y = self.text(MARGIN, y, wrapped(phrases, width, " · "), color=FAINT)
        return y + GAP

    def frame(self, x: float, y: float, width: float, height: float, color: str, thickness: float) -> None:
        """Draw an outline with these outer dimensions."""
        inner = (x + thickness / 2, y + thickness / 2), width - thickness, height - thickness
        self._rectangle(*inner, fill=False, edgecolor=color, linewidth=thickness)

    def tag(self, x: float, y: float, view: int) -> None:
        """Draw the number of a view on a square of its color."""
        self._rectangle((x, y), TAG, TAG, facecolor=_color(view), edgecolor="black", linewidth=0.5)
        self._centered(x + TAG / 2, y + TAG / 2 + 0.5, str(view + 1), TAG_FONT, "black")

    def crops(self, x: int, y: int, boxes: Sequence[NDArray[np.float64]]) -> None:
        """Draw the outline and number of each view's crop (top, left, height, width) in an image at x, y."""
        for view in sorted(range(len(boxes)), key=lambda view: -boxes[view][2] * boxes[view][3]):  # small crops on top
            top, left, height, width = boxes[view].tolist()
            for color, thickness in (("black", 4.5), (_color(view), 2.5)):  # black, for contrast with light images
                self._rectangle((x + left, y + top), width, height, fill=False, edgecolor=color, linewidth=thickness)
        taken: list[tuple[float, float]] = []
        for view, (top, left, _, _) in enumerate(boxes):
            across, down = x + left, y + top
            while any(abs(across - u) < TAG and abs(down - v) < TAG for u, v in taken):
                across += TAG
            taken.append((across, down))
            self.tag(across, down, view)

    def png(self, width: int, height: int) -> bytes:
        self.figure.set_size_inches(width / DPI, height / DPI)
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        file = io.BytesIO()
        with warnings.catch_warnings():
            # A file name may use a script that the font lacks: matplotlib then draws boxes.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.figure.savefig(file, format="png", dpi=DPI)
        return file.getvalue()

    def _centered(self, x: float, y: float, text: str, size: float, color: str) -> Text:
        style: dict[str, Any] = {"size": size, "weight": "bold", "color": color}
        return self.axes.text(x, y, text, ha="center", va="center_baseline", parse_math=False, **style)

    def _rectangle(self, corner: tuple[float, float], width: float, height: float, **style: Any) -> None:
        self.axes.add_patch(Rectangle(corner, width, height, joinstyle="miter", **style))


@dataclass(frozen=True)
class Head:
    """The heading of a column. view: the view whose number and color it shows, if any."""

    text: str
    notes: list[str] = field(default_factory=list)
    view: int | None = None


@dataclass(frozen=True)
class Cell:
    """An image with a caption. Each list of phrases of the caption begins a new line."""

    pixels: Pixels
    caption: list[list[str]] = field(default_factory=list)
    faint: list[list[str]] = field(default_factory=list)
    """The end of the caption, in a lighter color."""
    zoom: float = 1
    crops: Sequence[NDArray[np.float64]] = ()
    is_highlighted: bool = False


def draw_grid(
    title: str, notes: list[list[str]], heads: list[Head], rows: list[list[Cell]], min_width: int
) -> tuple[bytes, tuple[int, int]]:
    """Draw images with captions in a grid; returns a PNG file's bytes, and its width and height.

    min_width: of a column, in pixels.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(min_width, *(round(cell.pixels.shape[1] * cell.zoom) for cell in column)) for column in columns]
    lefts = np.cumsum([MARGIN, *(width + GAP for width in widths)]).tolist()
    right = lefts.pop() - GAP
    page = Page()
    y = page.heading(title, notes, right - MARGIN)

    bottoms = []
    for left, width, head in zip(lefts, widths, heads, strict=False):  # the last head may span several columns
        if head.view is not None:
            page.tag(left, y, head.view)
        below = page.text(left + (TAG + 6) * (head.view is not None), y, [head.text], HEAD_FONT, "bold")
        bottoms.append(page.text(left, below, wrapped(head.notes, width), color=FAINT))
    y = max(bottoms) + 6

    for row in rows:
        bottoms = []
        for left, width, cell in zip(lefts, widths, row, strict=True):
            frame: dict[str, Any] = {"frame": RED, "thickness": 4} if cell.is_highlighted else {}
            below = page.image(left, y, cell.pixels, cell.zoom, **frame) + 5
            page.crops(left, y, [box * cell.zoom for box in cell.crops])
            for phrases in cell.caption:
                below = page.text(left, below, wrapped(phrases, width), color=RED if cell.is_highlighted else INK)
            for phrases in cell.faint:
                below = page.text(left, below, wrapped(phrases, width), color=FAINT)
            bottoms.append(below)
        y = max(bottoms) + GAP
    size = (right + MARGIN, y - GAP + MARGIN)
    return page.png(*size), size


def _color(view: int) -> str:
    return COLORS[view % len(COLORS)]


@lru_cache(maxsize=4096)
def text_width(text: str, size: float = FONT, weight: str = "normal") -> float:
    """Width of a text in pixels."""
    renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return renderer.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), ismath=False)[0]


def wrapped(phrases: list[str], width: int, separator: str = ", ") -> list[str]:
    """Wrap phrases into lines of at most `width` pixels. A line break keeps the comma of ", ", but drops a " · "."""
    ending = "," * (separator == ", ")
    lines: list[str] = []
    for phrase in phrases:
        if lines and text_width(lines[-1] + separator + phrase + ending) <= width:
            lines[-1] += separator + phrase
        else:
            lines.append(fitted(phrase, width))
    return [line + ending for line in lines[:-1]] + lines[-1:]


def fitted(text: str, width: int, size: float = FONT, weight: str = "normal") -> str:
    """The text, or as much of its end as fits into `width` pixels: paths differ at their end."""
    text = cut = " ".join(text.encode(errors="replace").decode().split())  # a file name may hold any bytes
    while cut and text_width(text if cut == text else f"…{cut}", size, weight) > width:
        whole_folder = re.match(r".+?(?=/.|(?<=: ).)", cut)
        cut = cut[whole_folder.end() if whole_folder else 1 :]
    return text if cut == text else f"…{cut}"
