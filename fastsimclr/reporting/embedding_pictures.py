"""What an encoder's features look like: a map of the images, and a few of them beside their nearest neighbours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastsimclr.data import Source
from fastsimclr.data.augmentation import Views
from fastsimclr.data.params import epoch_order
from fastsimclr.data.sources import NO_LABEL
from fastsimclr.data.torchvision import decoded
from fastsimclr.reporting.contact_sheet import FAINT, INK, Page, Pixels, fitted, text_width, wrapped

Labels = NDArray[np.int64]
Names = dict[int, str]  # a label's class

LEGEND = 20  # classes; of more the names are in the map itself
TITLE_FONT, MARGIN = 18.0, 24
PLOT, PLOT_PAD, NARROWEST = 900, 24, 480
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#333333")
GREY, RED = "#b8b8bd", "#c8102e"
NAME_HIDES = 25  # pixels: classes up to twice as high
NAME_STEPS = range(0, 45, 9)  # pixels from its class's middle that a name may be moved
THUMB, COLUMN_GAP, ROW_GAP = 120, 14, 20
QUERY_GAP = 36  # between a query and its neighbours
FRAME = 4


# The map


def draw_map(title: str, notes: list[str], places: NDArray[np.float64], labels: Labels, names: Names) -> bytes:
    """The map as a PNG file's bytes. places: (N, 2); labels: (N,); names: of the classes among them, or none.

    Up to 20 classes have a legend; of more, each is named in its own place, as far as names have room.
    """
    at, width, height = _fit(places)
    present = [label for label in names if (labels == label).any()]
    has_legend = 0 < len(present) <= LEGEND
    entries = [*present, *[NO_LABEL] * (NO_LABEL in labels)] if has_legend else []
    counts = [f"{(labels == label).sum():,}" for label in entries]
    words = [fitted(names.get(label, "no label"), 200) for label in entries]
    word_width = round(max(map(text_width, ["class", *words])))
    count_right = 24 + word_width + 20 + round(max(map(text_width, ["images", *counts])))
    whole = width + (24 + count_right if has_legend else 0)

    page = Page()
    y = page.text(MARGIN, MARGIN, [fitted(title, whole, TITLE_FONT, "bold")], size=TITLE_FONT, weight="bold") + 4
    colors = dict(zip(present, _colors(at, labels, present, has_legend), strict=True))
    named: list[tuple[int, float, float]] = []
    if present and not has_legend:
        named = _place_names(at, labels, present, names, (width, height))
        left_out = len(present) - len(named)
        notes = [
            *notes,
            f"{len(present)} classes, " + (f"{left_out} of whose names have no room" if left_out else "named"),
        ]
    y = page.text(MARGIN, y, wrapped(notes, whole, " · "), color=FAINT) + 14

    page.frame(MARGIN - 1, y - 1, width + 2, height + 2, "#d1d1d6", 1)
    radius = float(np.clip(150 / np.sqrt(len(at)), 2.4, 6))
    triangles = set(present[len(COLORS) :]) if has_legend else set()
    plain = GREY if present else COLORS[0]
    shuffled = epoch_order(0, 0, len(at))  # no class covers the others because it comes last
    order = shuffled[np.argsort(labels[shuffled] != NO_LABEL, kind="stable")]  # those without a label below
    kinds = labels[order].tolist()
    page.dots(
        at[order] + (MARGIN, y),
        radius,
        [colors.get(label, plain) for label in kinds],
        [label in triangles for label in kinds],
        opacity=0.8,
    )
    for label, across, down in named:
        page.label(MARGIN + across, y + down, names[label], _darker(colors[label]))

    left, line = MARGIN + width + 24, y
    if has_legend:
        page.text(left + 24, line, ["class"], color=FAINT)
        line = page.text(left + count_right, line, ["images"], color=FAINT, align="right") + 6
    for label, word, count in zip(entries, words, counts, strict=True):
        page.dots(np.array([[left + 8, line + 7.5]]), 6, [colors.get(label, plain)], [label in triangles])
        page.text(left + 24, line, [word])
        line = page.text(left + count_right, line, [count], color=FAINT, align="right") + 5
    return page.png(whole + 2 * MARGIN, max(y + height, line) + MARGIN)


def _fit(places: NDArray[np.float64]) -> tuple[NDArray[np.float64], int, int]:
    """The places in pixels of a plot, one scale for both directions, and the plot's width and height."""
    extent = np.ptp(places, axis=0)
    scale = (PLOT - 2 * PLOT_PAD) / max(extent.max(), 1e-9)
    width, height = (max(NARROWEST, round(side * scale) + 2 * PLOT_PAD) for side in extent)
    at = (places - (places.min(0) + places.max(0)) / 2) * scale * (1, -1)
    return at + np.array([width / 2, height / 2]), width, height


def _middles(at: NDArray[np.float64], labels: Labels, present: Sequence[int]) -> NDArray[np.float64]:
    return np.array([np.median(at[labels == label], axis=0) for label in present])


def _colors(at: NDArray[np.float64], labels: Labels, present: Sequence[int], in_order: bool) -> list[str]:
    """A color for each class: in their order, or, of many classes, each unlike those of the classes around it."""
    if in_order or not present:
        return [COLORS[place % len(COLORS)] for place in range(len(present))]
    middles = _middles(at, labels, present)
    chosen: list[int] = []
    for place in range(len(present)):
        away = np.linalg.norm(middles[:place] - middles[place], axis=1)
        nearest_of = [min((d for d, c in zip(away, chosen, strict=True) if c == k), default=np.inf) for k in range(10)]
        chosen.append(int(np.argmax(nearest_of)))
    return [COLORS[k] for k in chosen]


def _place_names(
    at: NDArray[np.float64], labels: Labels, present: Sequence[int], names: Names, size: tuple[int, int]
) -> list[tuple[int, float, float]]:
    """Where classes' names are to be, (label, x, y) of its middle: amid its images, above them if it would hide them,
    or close by where others are already. The largest classes choose first; those that find no room are left out."""
    middles = dict(zip(present, _middles(at, labels, present), strict=True))
    for label, middle in middles.items():
        height = float(np.percentile(np.abs(at[labels == label, 1] - middle[1]), 90))
        middle[1] -= height + 12 if height < NAME_HIDES else 0
    named: list[tuple[int, float, float]] = []
    halves: dict[int, float] = {}  # half widths
    for label in sorted(present, key=lambda label: -(labels == label).sum()):
        halves[label] = half = text_width(names[label], weight="bold") / 2 + 3
        for step in NAME_STEPS:
            turns = np.linspace(0, 2 * np.pi, 16, endpoint=False) if step else np.zeros(1)
            spots = middles[label] + step * np.stack([np.sin(turns), np.cos(turns)], axis=1)
            spots = spots.clip((half + 2, 10), (size[0] - half - 2, size[1] - 10))
            free = [
                (x, y)
                for x, y in spots.tolist()
                if all(abs(x - u) >= half + halves[n] or abs(y - v) >= 14 for n, u, v in named)
            ]
            if free:
                named.append((label, *free[0]))
                break
    return named


def _darker(color: str) -> str:
    """For letters, which are thin."""
    return "#" + "".join(f"{int(color[k : k + 2], 16) * 6 // 10:02x}" for k in (1, 3, 5))


# The gallery


def draw_gallery(
    title: str,
    notes: list[str],
    source: Source,
    views: Views,
    names: Names,
    queries: NDArray[np.int64],
    cosines: NDArray[np.float32],
    neighbours: NDArray[np.int64],
) -> bytes:
    """Each query and its neighbours, as `nearest` gives them, in a row of a PNG file. Neighbours of another class than
    the query's are framed, and say so."""
    count = neighbours.shape[1]
    lefts = [MARGIN] + [MARGIN + THUMB + QUERY_GAP + k * (THUMB + COLUMN_GAP) for k in range(count)]
    whole = lefts[-1] + THUMB - MARGIN
    page = Page()
    y = page.text(MARGIN, MARGIN, [fitted(title, whole, TITLE_FONT, "bold")], size=TITLE_FONT, weight="bold") + 4
    labels = source.labels
    known = (labels[queries] != NO_LABEL)[:, None] & (labels[neighbours] != NO_LABEL)
    other = known & (labels[neighbours] != labels[queries][:, None])
    if known.any():
        alike = f"{(known & ~other).sum()} of {known.sum()} neighbours are of their query's class"
        notes = [*notes, f"{alike}; the others are framed in red and say “other”" if other.any() else alike]
    y = page.text(MARGIN, y, wrapped(notes, whole, " · "), color=FAINT) + 14
    page.text(lefts[0], y, ["query"], size=13, weight="bold")
    y = page.text(lefts[1], y, ["nearest neighbours, the most alike first"], size=13, weight="bold") + 8
    for row, query in enumerate(queries):
        images = [int(query), *neighbours[row].tolist()]
        bottoms = []
        for column, (left, image) in enumerate(zip(lefts, images, strict=True)):
            stands_out = bool(column) and bool(other[row, column - 1])
            border: dict[str, Any] = {"frame": RED, "thickness": FRAME} if stands_out else {}
            page.image(left, y, thumbnail(source, image, views), **border)
            name = names.get(int(labels[image]), "")
            lines = ["query" if column == 0 else f"cosine {cosines[row, column - 1]:.3f}", source.name(image)]
            below, color, weight = y + THUMB + FRAME + 3, INK, "bold" if column == 0 else "normal"
            if stands_out:
                name, color = f"other: {name}", RED
            if names:
                below = page.text(left, below, [_from_start(name, weight)], color=color, weight=weight)
            bottoms.append(page.text(left, below, [fitted(line, THUMB) for line in lines], color=FAINT))
        y = max(bottoms) + ROW_GAP
    return page.png(whole + 2 * MARGIN, y - ROW_GAP + MARGIN)


def thumbnail(source: Source, index: int, views: Views) -> Pixels:
    """The part of an image that the encoder sees, THUMB x THUMB."""
    pixels = decoded(source, index).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    side = max(1, round(min(height, width) * views.center_fraction))
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    return np.asarray(square.resize((THUMB, THUMB), Image.Resampling.LANCZOS))


def _from_start(text: str, weight: str) -> str:
    """As much of the text as a thumbnail is wide: of a class, the beginning tells it from others."""
    cut = text = " ".join(text.encode(errors="replace").decode().split())
    while cut and text_width(text if cut == text else f"{cut}…", weight=weight) > THUMB:
        cut = cut[:-1]
    return text if cut == text else f"{cut}…"
