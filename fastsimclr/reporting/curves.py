"""Curves of any length, reduced to what a chart can show without losing their extremes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST = 500
"""Points of a curve: about one a pixel. Longer ones are cut into as many bins."""


@dataclass(frozen=True)
class Curve:
    """Points (x, y), all of shape (P,), P at most MOST."""

    x: Floats
    y: Floats
    """A bin's mean, or the point itself."""
    low: Floats
    high: Floats
    steps_a_bin: int
    """1 where nothing was reduced."""
    ends: tuple[float, float]
    """x of the first and the last of all points, reduced ones too."""

    @property
    def smooth(self) -> Floats:
        """(P,) y averaged by a Gaussian of a hundredth of the curve's length, wider where it has few points."""
        points = len(self.y)
        sigma = max(points / 100, min(points / 25, 4.0))
        reach = np.arange(-round(3 * sigma), round(3 * sigma) + 1)
        weights = np.exp(-0.5 * (reach / sigma) ** 2)
        # Where the window leaves the curve, over what is left of it; a short curve is shorter than its window.
        total = np.convolve(np.ones_like(self.y), weights)
        first = len(reach) // 2
        return (np.convolve(self.y, weights) / total)[first : first + len(self.y)]


def reduce(x: Floats, y: Floats) -> Curve:
    """The curve of y over x, both (N,), without the points that are not finite."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) <= MOST:
        return Curve(x, y, y, y, 1, (x[0], x[-1]) if len(x) else (0.0, 0.0))
    edges = np.linspace(0, len(y), MOST + 1).astype(np.int64)
    sizes, starts = np.diff(edges), edges[:-1]
    return Curve(
        x=np.add.reduceat(x, starts) / sizes,
        y=np.add.reduceat(y, starts) / sizes,
        low=np.minimum.reduceat(y, starts),
        high=np.maximum.reduceat(y, starts),
        steps_a_bin=int(sizes.max()),
        ends=(x[0], x[-1]),
    )
