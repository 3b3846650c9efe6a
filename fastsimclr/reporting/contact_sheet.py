"""A page of images and text as a PNG file: axes whose data coordinates are pixels from the top left."""

import io
import re
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.markers import MarkerStyle
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (height, width, 3)

DPI = 72  # a point, matplotlib's unit of fonts and lines, is a pixel; and n / 72 * 72 is n in floating point, for all n
FONT, TAG_FONT, LINE = 11.5, 10.5, 15
TAG = 14  # side of the number at a crop's corner
INK, FAINT = "#1c1c1e", "#636366"
FRAME = "#c8c8c8"
COLORS = ("#ff453a", "#2f9bff", "#32d158", "#ffd60a", "#c77dff", "#ff9f0a", "#2ed9d9", "#ff7ac6")  # one a view


class Page:
    """Axes that fill a figure, whose size is given at the end. Positions are of the top left, in pixels."""

    def __init__(self) -> None:
        self.figure = Figure(dpi=DPI)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()

    def image(self, x: int, y: int, pixels: Pixels, zoom: float = 1, *, frame: str = FRAME, thickness: int = 1) -> int:
        """An image with a frame around it; returns the image's bottom. Only a zoom below 1 blends pixels."""
        height, width = (max(1, round(side * zoom)) for side in pixels.shape[:2])
        if zoom < 1:
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
        corner, sides = (x - thickness, y - thickness), (width + 2 * thickness, height + 2 * thickness)
        self._rectangle(corner, *sides, facecolor=frame, linewidth=0, zorder=-1)  # behind: an outline may hide pixels
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
        align: str = "left",
    ) -> int:
        """align: which part of a line x is: left, center or right. Returns where the next line would be."""
        step = round(LINE * size / FONT)
        for line in lines:
            baseline = y + round(0.75 * step)  # the tops of letters differ
            style: dict[str, Any] = {"size": size, "weight": weight, "color": color, "ha": align}
            self.axes.text(x, baseline, line, parse_math=False, **style)
            y += step
        return y

    def label(self, x: float, y: float, text: str, color: str = INK) -> None:
        """A word on top of other things, on a white halo, its middle at x, y."""
        self._centered(x, y, text, FONT, color).set_path_effects([withStroke(linewidth=3, foreground="white")])

    def dots(
        self,
        at: NDArray[np.float64],
        radius: float,
        colors: list[str],
        triangles: list[bool],
        opacity: float = 1,
    ) -> None:
        """Points of a plot, (N, 2), the last on top; some as triangles of about the same area."""
        shapes = {kind: MarkerStyle("^" if kind else "o") for kind in (False, True)}
        paths = {kind: shape.get_path().transformed(shape.get_transform()) for kind, shape in shapes.items()}
        sizes: Any = [(2 * radius) ** 2 * (1.6 if triangle else 1) for triangle in triangles]
        drawn = self.axes.scatter(
            at[:, 0], at[:, 1], s=sizes, c=colors, edgecolors="white", linewidths=0.4, alpha=opacity
        )
        drawn.set_paths([paths[triangle] for triangle in triangles])

    def frame(self, x: float, y: float, width: float, height: float, color: str, thickness: float) -> None:
        """An outline of these outer sides."""
        inner = (x + thickness / 2, y + thickness / 2), width - thickness, height - thickness
        self._rectangle(*inner, fill=False, edgecolor=color, linewidth=thickness)

    def tag(self, x: float, y: float, view: int) -> None:
        """The number of a view on its color."""
        self._rectangle((x, y), TAG, TAG, facecolor=_color(view), edgecolor="black", linewidth=0.5)
        self._centered(x + TAG / 2, y + TAG / 2 + 0.5, str(view + 1), TAG_FONT, "black")

    def crops(self, x: int, y: int, boxes: list[NDArray[np.float64]]) -> None:
        """The outline of each view's crop (top, left, height, width) in an image at x, y; each with its number."""
        for view in sorted(range(len(boxes)), key=lambda view: -boxes[view][2] * boxes[view][3]):  # small ones on top
            top, left, height, width = boxes[view].tolist()
            for color, thickness in (("black", 4.5), (_color(view), 2.5)):  # black: for light images
                self._rectangle((x + left, y + top), width, height, fill=False, edgecolor=color, linewidth=thickness)
        taken: list[tuple[float, float]] = []
        for view, (top, left, height, width) in enumerate(boxes):
            places = [
                (x + left + across, y + top + down)
                for down in np.arange(0, max(1, height - TAG), TAG)
                for across in np.arange(0, max(1, width - TAG), TAG)
            ]
            places += [(x + left + beside * TAG, y + top) for beside in range(len(boxes))]  # of crops that coincide
            free = (p for p in places if all(abs(p[0] - q[0]) >= TAG or abs(p[1] - q[1]) >= TAG for q in taken))
            taken.append(next(free, places[0]))
            self.tag(*taken[-1], view)

    def png(self, width: int, height: int) -> bytes:
        self.figure.set_size_inches(width / DPI, height / DPI)
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        file = io.BytesIO()
        with warnings.catch_warnings():
            # Of a file's name in a script that the font lacks: boxes are drawn instead.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.figure.savefig(file, format="png", dpi=DPI)
        return file.getvalue()

    def _centered(self, x: float, y: float, text: str, size: float, color: str) -> Text:
        style: dict[str, Any] = {"size": size, "weight": "bold", "color": color}
        return self.axes.text(x, y, text, ha="center", va="center_baseline", parse_math=False, **style)

    def _rectangle(self, corner: tuple[float, float], width: float, height: float, **style: Any) -> None:
        self.axes.add_patch(Rectangle(corner, width, height, joinstyle="miter", **style))


def _color(view: int) -> str:
    return COLORS[view % len(COLORS)]


@lru_cache(maxsize=4096)
def text_width(text: str, size: float = FONT, weight: str = "normal") -> float:
    """In pixels of the sheet."""
    renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return renderer.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), ismath=False)[0]


def wrapped(phrases: list[str], width: int, separator: str = ", ") -> list[str]:
    """The phrases in lines no wider than `width`. A comma, unlike a dot, also stands where a line is broken."""
    ending = "," * (separator == ", ")
    lines: list[str] = []
    for phrase in phrases:
        if lines and text_width(lines[-1] + separator + phrase + ending) <= width:
            lines[-1] += separator + phrase
        else:
            lines.append(fitted(phrase, width))
    return [line + ending for line in lines[:-1]] + lines[-1:]


def fitted(text: str, width: int, size: float = FONT, weight: str = "normal") -> str:
    """The text, or as much of its end as is no wider than `width`: the end tells a file from its neighbours."""
    text = cut = " ".join(text.encode(errors="replace").decode().split())  # a file's name may hold any byte
    while cut and text_width(text if cut == text else f"…{cut}", size, weight) > width:
        whole_folder = re.match(r".+?(?=/.|(?<=: ).)", cut)
        cut = cut[whole_folder.end() if whole_folder else 1 :]
    return text if cut == text else f"…{cut}"
