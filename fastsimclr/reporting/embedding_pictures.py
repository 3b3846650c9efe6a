"""What an encoder's features look like: a map of the images, and a few of them beside their nearest neighbors."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastsimclr.data import Source
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.params import epoch_order
from fastsimclr.data.sources import NO_LABEL
from fastsimclr.data.torchvision import decoded
from fastsimclr.reporting.contact_sheet import MARGIN, Cell, Head, Page, Pixels, draw_grid, fitted, text_width

Labels = NDArray[np.int64]
Names = dict[int, str]  # a label's class

LEGEND = 20  # classes; with more, the names are in the map itself
PLOT, PLOT_PAD, NARROWEST = 900, 24, 480
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#333333")
GREY = "#b8b8bd"
THUMB = 120


def draw_map(title: str, notes: list[str], places: NDArray[np.float64], labels: Labels, names: Names) -> bytes:
    """The map as a PNG file's bytes. places: (N, 2); labels: (N,); names: of the classes among them, or none.

    Up to 20 classes have a legend; of more, each is named in its own place, if there is room.
    """
    at, width, height = _fit(places)
    present = [label for label in names if (labels == label).any()]
    middles = {label: np.median(at[labels == label], axis=0) for label in present}
    has_legend = len(present) <= LEGEND
    in_turn = present if has_legend else sorted(present, key=lambda label: middles[label][0])  # unlike their neighbors
    colors = {label: COLORS[turn % len(COLORS)] for turn, label in enumerate(in_turn)}
    colors[NO_LABEL] = GREY if present else COLORS[0]
    markers = dict.fromkeys(colors, "o") | dict.fromkeys(present[len(COLORS) :] if has_legend else [], "^")

    named: list[tuple[int, float, float]] = []
    entries: list[tuple[str, str, str]] = []
    if not has_legend:
        named = _place_names(middles, labels, names, (width, height))
        notes = [*notes, f"{len(present)} classes, {len(named)} of them named"]
    elif present:
        for label in [*present, *[NO_LABEL] * (NO_LABEL in labels)]:
            name = fitted(names.get(label, "no label"), 200)
            entries.append((colors[label], markers[label], f"{name} ({(labels == label).sum():,})"))
    beside = 60 + round(max(text_width(text) for _, _, text in entries)) if entries else 0

    page = Page()
    y = page.heading(title, [notes], width + beside)
    page.frame(MARGIN - 1, y - 1, width + 2, height + 2, "#d1d1d6", 1)
    shuffled = epoch_order(0, 0, len(at))  # no class covers the others because it comes last
    order = shuffled[np.argsort(labels[shuffled] != NO_LABEL, kind="stable")]  # those without a label below
    kinds = labels[order].tolist()
    radius = float(np.clip(150 / np.sqrt(len(at)), 2.4, 6))
    page.dots(at[order] + (MARGIN, y), radius, [colors[kind] for kind in kinds], [markers[kind] for kind in kinds])
    for label, across, down in named:
        page.label(MARGIN + across, y + down, names[label])
    if entries:
        page.legend(MARGIN + width + 24, y, entries)
    return page.png(width + beside + 2 * MARGIN, y + height + MARGIN)


def _fit(places: NDArray[np.float64]) -> tuple[NDArray[np.float64], int, int]:
    """The places in pixels of a plot, one scale for both directions, and the plot's width and height."""
    extent = np.ptp(places, axis=0)
    scale = (PLOT - 2 * PLOT_PAD) / max(extent.max(), 1e-9)
    width, height = (max(NARROWEST, round(side * scale) + 2 * PLOT_PAD) for side in extent)
    at = (places - (places.min(0) + places.max(0)) / 2) * scale * (1, -1)
    return at + np.array([width / 2, height / 2]), width, height


def _place_names(
    middles: dict[int, NDArray[np.float64]], labels: Labels, names: Names, size: tuple[int, int]
) -> list[tuple[int, float, float]]:
    """(label, x, y) of each name that has room at its class's middle. The largest classes choose first."""
    named: list[tuple[int, float, float]] = []
    halves = {label: text_width(names[label], weight="bold") / 2 + 3 for label in middles}
    for label in sorted(middles, key=lambda label: -(labels == label).sum()):
        half = halves[label]
        x, y = middles[label].clip((half + 2, 10), (size[0] - half - 2, size[1] - 10)).tolist()
        if all(abs(x - u) >= half + halves[n] or abs(y - v) >= 14 for n, u, v in named):
            named.append((label, x, y))
    return named


def draw_gallery(
    title: str,
    notes: list[str],
    source: Source,
    augmentation: Augmentation,
    names: Names,
    queries: NDArray[np.int64],
    cosines: NDArray[np.float32],
    neighbors: NDArray[np.int64],
) -> bytes:
    """Each query and its neighbors, as `nearest` gives them, in a row of a PNG file. Neighbors of another class than
    the query's are framed, and say so."""
    labels = source.labels
    known = (labels[queries] != NO_LABEL)[:, None] & (labels[neighbors] != NO_LABEL)
    other = known & (labels[neighbors] != labels[queries][:, None])
    if known.any():
        alike = f"{(known & ~other).sum()} of {known.sum()} neighbors are of their query's class"
        notes = [*notes, f"{alike}; the others are framed in red and say “other”" if other.any() else alike]

    def cell(image: int, what: str, stands_out: bool = False) -> Cell:
        name = "other: " * stands_out + names.get(int(labels[image]), "")
        caption = [[name]] if names else []
        return Cell(
            thumbnail(source, image, augmentation), caption, [[what], [source.name(image)]], stands_out=stands_out
        )

    rows = []
    for row, query in enumerate(queries.tolist()):
        found = zip(neighbors[row].tolist(), cosines[row].tolist(), other[row].tolist(), strict=True)
        beside = [cell(image, f"cosine {cosine:.3f}", stands_out) for image, cosine, stands_out in found]
        rows.append([cell(query, "query"), *beside])
    heads = [Head("query"), Head("nearest neighbors, most similar first")]
    return draw_grid(title, [notes], heads, rows, THUMB)[0]


def thumbnail(source: Source, index: int, augmentation: Augmentation) -> Pixels:
    """The part of an image that the encoder sees, THUMB x THUMB."""
    pixels = decoded(source, index).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    side = max(1, round(min(height, width) * augmentation.center_fraction))
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    return np.asarray(square.resize((THUMB, THUMB), Image.Resampling.LANCZOS))
