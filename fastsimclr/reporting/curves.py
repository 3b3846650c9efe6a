"""Downsampling of curves for charts, which keeps their extremes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST = 500
"""Maximum number of points of a curve, about one per pixel. Longer curves are averaged in as many bins."""


@dataclass(frozen=True)
class Curve:
    """A curve to draw. All arrays have shape (P,), P at most MOST."""

    x: Floats
    y: Floats
    """The mean of each bin, or the points themselves."""
    low: Floats
    """The minimum of each bin."""
    high: Floats
    """The maximum of each bin."""
    points_per_bin: int
    """1 if the curve was not downsampled."""
    ends: tuple[float, float]
    """x of the first and the last point before downsampling."""

    @property
    def smooth(self) -> Floats:
        """(P,) y smoothed by a Gaussian with a sigma of 1 % of the curve's length, or more for short curves."""
        points = len(self.y)
        sigma = max(points / 100, min(points / 25, 4.0))
        reach = np.arange(-round(3 * sigma), round(3 * sigma) + 1)
        weights = np.exp(-0.5 * (reach / sigma) ** 2)
        # Normalize by the part of the window within the curve, which may be shorter than the window.
        total = np.convolve(np.ones_like(self.y), weights)
        first = len(reach) // 2
        return (np.convolve(self.y, weights) / total)[first : first + len(self.y)]


def reduce(x: Floats, y: Floats) -> Curve:
    """Downsample y over x, both (N,), without points that are not finite."""
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
        points_per_bin=int(sizes.max()),
        ends=(x[0], x[-1]),
    )
