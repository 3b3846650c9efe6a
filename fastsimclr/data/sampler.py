"""The order of the images, their division among the ranks, and the position within an epoch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.params import epoch_order
from fastsimclr.errors import UserError


class SampledBatch(NamedTuple):
    """This rank's part of a batch."""

    epoch: int
    index: NDArray[np.int64]  # type: ignore[assignment]  # (B,): indices of the images in the source
    next_epoch: int
    """The epoch of the batch after it."""
    next_position: int
    """The position after it: 0 if it is the last batch of its epoch."""


@dataclass
class Sampler:
    """Divides the images of an epoch into global batches, and each batch among the ranks.

    The order is a function of seed and epoch. Batch b has the images [b B, (b+1) B) of the order, for any number of
    ranks. The last batch may be smaller; it is dropped if some rank would have fewer than `min_local_batch` images.
    """

    images: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    min_local_batch: int = 1
    epoch: int = 0
    position: int = 0
    """Number of images of this epoch, over all ranks, before the next batch."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank: got {self.rank} of {self.world_size}, expected 0 to {self.world_size - 1}")
        if self.batch_size < 1:
            raise UserError(f"batch_size: got {self.batch_size}, expected at least 1")
        if self.batch_size > self.images:
            raise UserError(
                f"batch_size: got {self.batch_size}, more than the dataset's {self.images} images; "
                f"expected at most {self.images}"
            )
        if self.batch_size // self.world_size < self.min_local_batch:
            raise UserError(
                f"batch_size: got {self.batch_size} for {self.world_size} ranks, so "
                f"{self.batch_size // self.world_size} on some rank; expected at least "
                f"{self.min_local_batch * self.world_size}, {self.min_local_batch} per rank"
            )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._bounds(0))

    @property
    def is_at_end(self) -> bool:
        """Whether no batch of the epoch remains."""
        return not self._bounds(self.position)

    def remaining(self) -> list[SampledBatch]:
        """Return this rank's parts of the batches of the epoch from `position` on."""
        order = epoch_order(self.seed, self.epoch, self.images) if self.shuffle else np.arange(self.images)
        bounds = self._bounds(self.position)
        parts = [np.array_split(order[first:end], self.world_size)[self.rank] for first, end in bounds]
        after = [(self.epoch, end) for _, end in bounds[:-1]] + [(self.epoch + 1, 0)]
        return [SampledBatch(self.epoch, part, *end) for part, end in zip(parts, after, strict=False)]

    def from_here_on(self) -> Iterator[SampledBatch]:
        """Yield this rank's parts of the batches from `position` on, of this epoch and of all later ones.

        The order of each epoch is drawn in a thread during the epoch before it.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="fastsimclr-order")
        try:
            batches = self.remaining()
            for epoch in count(self.epoch + 1):
                upcoming = thread.submit(replace(self, epoch=epoch, position=0).remaining)
                yield from batches
                batches = upcoming.result()
        finally:
            thread.shutdown(wait=False)  # not a `with` block: the thread may itself collect this generator

    def _bounds(self, position: int) -> list[tuple[int, int]]:
        min_batch = self.batch_size if self.drop_last else max(1, self.min_local_batch * self.world_size)
        bounds = [
            (first, min(first + self.batch_size, self.images))
            for first in range(position, self.images, self.batch_size)
        ]
        return [(first, end) for first, end in bounds if end - first >= min_batch]

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position from `state`. Raises UserError if it is from other data or another seed."""
        for name in ("images", "seed"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"checkpoint: got a run with {name} {state[name]}, but this one has {getattr(self, name)}; "
                    "expected the same data and seed: use those, or --resume never"
                )
        self.epoch, self.position = state["epoch"], state["position"]
