"""A page of pictures and text, laid out in its own pixels from the top left, as a PNG file."""

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
from matplotlib.patches import Circle, Patch, Rectangle, RegularPolygon
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (height, width, 3)

DPI = 72  # a point, matplotlib's unit of fonts and lines, is a pixel; and n / 72 * 72 is n in floating point, for all n
FONT, TAG_FONT, LINE = 11.5, 10.5, 15
TAG = 14  # side of the number at a crop's corner
INK, FAINT = "#1c1c1e", "#636366"
FRAME = 200  # a level of grey
COLOURS = ("#ff453a", "#2f9bff", "#32d158", "#ffd60a", "#c77dff", "#ff9f0a", "#2ed9d9", "#ff7ac6")  # one a view


class Page:
    """What to draw, collected while its height is not known yet. Positions are of the top left, in pixels."""

    def __init__(self) -> None:
        self.pictures: list[tuple[int, int, Pixels]] = []
        self.shapes: list[Patch] = []
        self.texts: list[dict[str, Any]] = []

    def picture(self, x: int, y: int, pixels: Pixels) -> None:
        self.pictures.append((x, y, pixels))

    def text(
        self,
        x: float,
        y: int,
        lines: Iterable[str],
        size: float = FONT,
        weight: str = "normal",
        colour: str = INK,
        align: str = "left",
    ) -> int:
        """align: which part of a line x is: left, center or right. Returns where the next line would be."""
        step = round(LINE * size / FONT)
        for line in lines:
            # Its baseline is what is placed: the tops of letters differ.
            at = {"x": x, "y": y + round(0.75 * step), "va": "baseline", "ha": align}
            self.texts.append({**at, "text": line, "fontsize": size, "fontweight": weight, "color": colour})
            y += step
        return y

    def label(self, x: float, y: float, text: str, colour: str = INK) -> None:
        """A word on top of other things, on a halo of white, its middle at x, y."""
        at = {
            "x": x,
            "y": y,
            "ha": "center",
            "va": "center_baseline",
            "path_effects": [withStroke(linewidth=3, foreground="white")],
        }
        self.texts.append({**at, "text": text, "fontsize": FONT, "fontweight": "bold", "color": colour})

    def dot(
        self, x: float, y: float, radius: float, colour: str, *, triangle: bool = False, opacity: float = 1
    ) -> None:
        """A point of a plot, its middle at x, y; a triangle of the same area on request."""
        shape: Patch = (
            RegularPolygon((x, y), 3, radius=1.55 * radius, orientation=np.pi) if triangle else Circle((x, y), radius)
        )
        shape.set(facecolor=colour, edgecolor="white", linewidth=0.4, alpha=opacity)
        self.shapes.append(shape)

    def frame(self, x: float, y: float, width: float, height: float, colour: str, thickness: float) -> None:
        """An outline of these outer sides."""
        inner = (x + thickness / 2, y + thickness / 2), width - thickness, height - thickness
        self.shapes.append(Rectangle(*inner, fill=False, joinstyle="miter", edgecolor=colour, linewidth=thickness))

    def tag(self, x: float, y: float, view: int) -> None:
        """The number of a view on its colour."""
        self.shapes.append(Rectangle((x, y), TAG, TAG, facecolor=_colour(view), edgecolor="black", linewidth=0.5))
        at = {"x": x + TAG / 2, "y": y + TAG / 2 + 0.5, "ha": "center", "va": "center_baseline"}
        self.texts.append({**at, "text": str(view + 1), "fontsize": TAG_FONT, "fontweight": "bold", "color": "black"})

    def crops(self, x: int, y: int, boxes: list[NDArray[np.float64]]) -> None:
        """The outline of each view's crop (top, left, height, width) in a picture at x, y; each with its number."""
        for view in sorted(range(len(boxes)), key=lambda view: -boxes[view][2] * boxes[view][3]):  # small ones on top
            top, left, height, width = boxes[view].tolist()
            for colour, thickness in (("black", 4.5), (_colour(view), 2.5)):  # black: for light images
                outline = Rectangle((x + left, y + top), width, height, fill=False, joinstyle="miter")
                outline.set(edgecolor=colour, linewidth=thickness)
                self.shapes.append(outline)
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
        sheet = np.full((height, width, 3), 255, np.uint8)
        for x, y, pixels in self.pictures:
            bottom, right = y + pixels.shape[0], x + pixels.shape[1]
            sheet[y - 1 : bottom + 1, x - 1 : right + 1] = FRAME  # a white picture has an edge too
            sheet[y:bottom, x:right] = pixels
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        FigureCanvasAgg(figure)
        figure.figimage(sheet, origin="upper")  # pixel by pixel: nothing is resampled
        from_top = Affine2D().scale(1, -1).translate(0, height)
        for order, artist in enumerate([*self.shapes, *(Text(parse_math=False, **text) for text in self.texts)]):
            artist.set(transform=from_top, zorder=order + 1)
            figure.add_artist(artist)
        file = io.BytesIO()
        with warnings.catch_warnings():
            # Of a file's name in a script that the font lacks: boxes are drawn instead.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(file, format="png", dpi=DPI)
        return file.getvalue()


def _colour(view: int) -> str:
    return COLOURS[view % len(COLOURS)]


def resized(pixels: Pixels, zoom: float) -> Pixels:
    """Each pixel repeated `zoom` times in both directions; or, below 1, reduced."""
    if zoom >= 1:
        return pixels.repeat(int(zoom), axis=0).repeat(int(zoom), axis=1)
    height, width = (max(1, round(side * zoom)) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


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
