"""Pictures of an encoder's features: a map of the images, and a gallery of nearest neighbors."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastsimclr.data import Source
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.params import epoch_order
from fastsimclr.data.sources import NO_LABEL, decoded
from fastsimclr.reporting.contact_sheet import MARGIN, Cell, Head, Page, Pixels, draw_grid, fitted, text_width

Labels = NDArray[np.int64]
Names = dict[int, str]  # label to class name

LEGEND = 20  # classes; with more, the names are drawn in the map
PLOT, PLOT_PAD, NARROWEST = 900, 24, 480
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#333333")
GRAY = "#b8b8bd"
THUMB = 120


def draw_map(title: str, notes: list[str], points: NDArray[np.float64], labels: Labels, names: Names) -> bytes:
    """Draw the map; returns a PNG file's bytes.

    points: (N, 2); labels: (N,); names: of the classes among them, may be empty. Up to 20 classes have a legend.
    More classes are named within the map, where there is room.
    """
    at, width, height = _fit(points)
    present = [label for label in names if (labels == label).any()]
    middles = {label: np.median(at[labels == label], axis=0) for label in present}
    has_legend = len(present) <= LEGEND
    # Without a legend, sorting by position gives neighboring classes different colors.
    ordered = present if has_legend else sorted(present, key=lambda label: middles[label][0])
    colors = {label: COLORS[k % len(COLORS)] for k, label in enumerate(ordered)}
    colors[NO_LABEL] = GRAY if present else COLORS[0]
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
    shuffled = epoch_order(0, 0, len(at))  # so that the last class does not cover the others
    order = shuffled[np.argsort(labels[shuffled] != NO_LABEL, kind="stable")]  # unlabeled images below
    kinds = labels[order].tolist()
    radius = float(np.clip(150 / np.sqrt(len(at)), 2.4, 6))
    page.dots(at[order] + (MARGIN, y), radius, [colors[kind] for kind in kinds], [markers[kind] for kind in kinds])
    for label, across, down in named:
        page.label(MARGIN + across, y + down, names[label])
    if entries:
        page.legend(MARGIN + width + 24, y, entries)
    return page.png(width + beside + 2 * MARGIN, y + height + MARGIN)


def _fit(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], int, int]:
    """Scale the points to pixels, equally in both directions; returns them, and the plot's width and height."""
    extent = np.ptp(points, axis=0)
    scale = (PLOT - 2 * PLOT_PAD) / max(extent.max(), 1e-9)
    width, height = (max(NARROWEST, round(side * scale) + 2 * PLOT_PAD) for side in extent)
    at = (points - (points.min(0) + points.max(0)) / 2) * scale * (1, -1)
    return at + np.array([width / 2, height / 2]), width, height


def _place_names(
    middles: dict[int, NDArray[np.float64]], labels: Labels, names: Names, size: tuple[int, int]
) -> list[tuple[int, float, float]]:
    """Return (label, x, y) of each name that fits at the center of its class, the largest classes first."""
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
    """Draw one row per query with its neighbors, as `nearest` returns them; returns a PNG file's bytes.

    Neighbors of another class than the query's have a red frame and "other" in their caption.
    """
    labels = source.labels
    known = (labels[queries] != NO_LABEL)[:, None] & (labels[neighbors] != NO_LABEL)
    other = known & (labels[neighbors] != labels[queries][:, None])
    if known.any():
        alike = f"{(known & ~other).sum()} of {known.sum()} neighbors have the class of their query"
        notes = [*notes, f"{alike}; the others have a red frame and “other” in the caption" if other.any() else alike]

    def cell(image: int, what: str, is_other: bool = False) -> Cell:
        name = "other: " * is_other + names.get(int(labels[image]), "")
        caption = [[name]] if names else []
        return Cell(
            thumbnail(source, image, augmentation), caption, [[what], [source.name(image)]], is_highlighted=is_other
        )

    rows = []
    for row, query in enumerate(queries.tolist()):
        found = zip(neighbors[row].tolist(), cosines[row].tolist(), other[row].tolist(), strict=True)
        neighbor_cells = [cell(image, f"cosine {cosine:.3f}", is_other) for image, cosine, is_other in found]
        rows.append([cell(query, "query"), *neighbor_cells])
    heads = [Head("query"), Head("nearest neighbors, most similar first")]
    return draw_grid(title, [notes], heads, rows, THUMB)[0]


def thumbnail(source: Source, index: int, augmentation: Augmentation) -> Pixels:
    """The center crop of an image that the encoder sees, resized to THUMB x THUMB."""
    shown = (0, 1, 2) if source.pixels.channels >= 3 else (0, 0, 0)
    pixels = source.pixels.for_display(decoded(source, index), shown).numpy()
    height, width = pixels.shape[:2]
    side = max(1, round(min(height, width) * augmentation.center_fraction))
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    return np.asarray(square.resize((THUMB, THUMB), Image.Resampling.LANCZOS))
