"""The full check of a data set, `fastsimclr doctor --data`: every image is decoded, and a summary is made."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsimclr import stopping
from fastsimclr.data.cache_folder import cache_folder
from fastsimclr.data.dataset import open_pair
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.scan import scan
from fastsimclr.distributed import World
from fastsimclr.progress_bar import duration

_STOP_WITHIN_S = 4.0  # by then, the images that are being decoded are done, and all ranks agree to stop
_MAX_SHOWN = 5  # bad images


@dataclass(frozen=True)
class Sizes:
    """Height and width of the smallest image, the median one and the largest, by their number of pixels."""

    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]

    def __str__(self) -> str:
        named = asdict(self).items()
        return "height x width: " + ", ".join(f"{name} {height} x {width}" for name, (height, width) in named)


@dataclass(frozen=True)
class BadImage:
    """The name of an image that cannot be used, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class FullCheck:
    """What the check found. Its fields are the JSON of `fastsimclr doctor --data PATH --json`."""

    data: str
    images: int
    classes: int | None
    """Number of classes; None if not all images have labels."""
    notes: Sequence[str]
    """What was passed over when the data was opened."""
    sizes: Sizes | None
    """None if all images are bad."""
    bad: Sequence[BadImage]
    read: int
    """Number of images read by this check; the results of the others were in the cache folder."""
    seconds: float
    results: str | None
    """The file of the results, which runs use; None if they are not kept."""

    def describe(self) -> str:
        """Return the summary to print."""
        classes = "no labels" if self.classes is None else f"{self.classes} classes"
        rate = f" ({self.read / self.seconds:,.0f} images/s)" if self.read else ""
        before = f", {self.images - self.read:,} before" if self.results and self.read < self.images else ""
        lines = [
            f"data: {self.data}, {self.images:,} images, {classes}",
            f"checked: {self.read:,} images in {duration(self.seconds)}{rate}{before}",
        ]
        if self.sizes is not None:
            lines.append(str(self.sizes))
        lines.append(f"bad: {len(self.bad):,} of {self.images:,} images cannot be used" if self.bad else "bad: none")
        lines += [f"  {bad}" for bad in self.bad[:_MAX_SHOWN]]
        if len(self.bad) > _MAX_SHOWN:
            lines.append(f"  and {len(self.bad) - _MAX_SHOWN:,} more; --list FILE writes all")
        if self.results is not None:
            lines.append(f"results: {self.results}; runs on this data use them")
        return "\n".join(line.replace("\n", "\\n") for line in lines)


def check_data(
    data: Any, *, cache: str | Path | None, pixels: PixelOptions, world: World, stop: Callable[[], bool]
) -> FullCheck:
    """Open and check images, on all cores of all ranks. Every rank returns the result.

    data: as for `open_source`. cache: the cache folder, --data.cache.
    Raises UserError on all ranks for data that cannot be opened and for images of another form than the others, and
    Stopped once `stop` returns True on any rank; what was checked until then is not checked again.
    """
    started = time.monotonic()
    source = open_pair(data, None, world, pixels, cache=cache).train
    stopping.active().defer(_STOP_WITHIN_S)
    result = scan(source, cache=cache_folder(cache), world=world, stop=stop)
    source.bad = result.bad
    of_good = result.sizes[result.sizes[:, 0] > 0]
    sizes = None
    if len(of_good):
        by_pixels = of_good[np.argsort(of_good.astype(np.int64).prod(1), kind="stable")]
        smallest, median, largest = (tuple(by_pixels[at].tolist()) for at in (0, len(by_pixels) // 2, -1))
        sizes = Sizes(smallest, median, largest)
    return FullCheck(
        data=str(data),
        images=len(source),
        classes=len(source.classes) if source.has_labels else None,
        notes=list(source.notes),
        sizes=sizes,
        bad=[BadImage(source.name(index), reason) for index, reason in result.bad.items()],
        read=result.read,
        seconds=time.monotonic() - started,
        results=None if result.file is None else str(result.file),
    )
