"""Replacement of images that cannot be used, when a batch is loaded.

Nothing is removed from a source, so the order of an epoch does not depend on what is known about its images. A bad
image is replaced by another one of the source. Which one is a function of seed, epoch and the bad image, so that every
backend, rank and worker, and a resumed run, uses the same.
"""

from collections.abc import Callable
from itertools import count
from typing import TypeVar

import numpy as np

from fastsimclr.data.loader import BatchRequest
from fastsimclr.data.params import REPLACEMENT, philox
from fastsimclr.data.sources import WrongForm
from fastsimclr.data.storage import UnreachableStorage
from fastsimclr.errors import UserError

MAX_BAD_IN_A_ROW = 32
"""Bad images among the candidates for one image before the source is taken to be unreadable. Even if half of a million
images were bad, it would not be."""

Value = TypeVar("Value")


def replacement(seed: int, epoch: int, index: int, attempt: int, images: int) -> int:
    """Return the candidate number `attempt`, from 0, to replace image `index` of `images` in this epoch.

    The candidates are independent and uniform over all images.
    """
    words = philox(seed, epoch, np.array([index]), REPLACEMENT, [attempt])[0, 0]
    return int(words[0] << np.uint64(32) | words[1]) % images


def read_or_replace(
    request: BatchRequest, row: int, images: int, read: Callable[[int], Value]
) -> tuple[int, Value, dict[int, str]]:
    """Read the image of a row of the request, or the first of its replacements that can be read.

    images: number of images of the source. read(index) returns the image, or raises UserError if it is bad.
    Returns the index of the image used, what `read` returned for it, and the images that were found bad, with the
    messages. Raises UserError if MAX_BAD_IN_A_ROW or all images are bad, and WrongForm and UnreachableStorage as `read`
    does.
    """
    wanted = candidate = int(request.index[row])
    found: dict[int, str] = {}
    for attempt in count():
        if candidate not in request.bad and candidate not in found:
            try:
                return candidate, read(candidate), found
            except (WrongForm, UnreachableStorage):
                raise
            except UserError as error:
                found[candidate] = str(error)
        if len(found) == MAX_BAD_IN_A_ROW or len(request.bad) + len(found) >= images:
            what = f"{len(found)} images in a row" if found else f"all {images} images known to be bad"
            reason = f", the last with {found[candidate]}" if candidate in found else ""
            raise UserError(f"data: got {what} that cannot be used{reason}; expected images: check the data's storage")
        candidate = replacement(request.seed, request.epoch, wanted, attempt, images)
    raise AssertionError("count() has no end")
