"""Which images each rank sees, in which order, and where it stands."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.params import epoch_order
from fastsimclr.errors import UserError


@dataclass
class Sampler:
    """Global batches of an epoch's order, each divided among the ranks.

    The order is a function of seed and epoch; batch b is its images [b B, (b+1) B), whatever the number of ranks. The
    last batch may be smaller. It is dropped if some rank would have fewer than `min_local_batch` images of it.
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
    """Images of this epoch, of all ranks, that the next batch comes after."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank: got {self.rank} of {self.world_size}, expected 0 to {self.world_size - 1}")
        if self.batch_size < 1:
            raise UserError(f"batch_size: got {self.batch_size}, expected at least 1")
        if self.batch_size > self.images:
            raise UserError(
                f"batch_size: got {self.batch_size}, more than the data set's {self.images} images; "
                f"expected at most {self.images}"
            )
        if self.batch_size // self.world_size < self.min_local_batch:
            raise UserError(
                f"batch_size: got {self.batch_size} for {self.world_size} ranks, so "
                f"{self.batch_size // self.world_size} for some rank; expected at least "
                f"{self.min_local_batch * self.world_size}, {self.min_local_batch} for each"
            )

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._bounds(0))

    def remaining(self) -> list[NDArray[np.int64]]:
        """This rank's part of each batch of the epoch from `position` on."""
        order = epoch_order(self.seed, self.epoch, self.images) if self.shuffle else np.arange(self.images)
        return [
            np.array_split(order[first:end], self.world_size)[self.rank] for first, end in self._bounds(self.position)
        ]

    def _bounds(self, position: int) -> list[tuple[int, int]]:
        least = self.batch_size if self.drop_last else max(1, self.min_local_batch * self.world_size)
        ends = [
            (first, min(first + self.batch_size, self.images))
            for first in range(position, self.images, self.batch_size)
        ]
        return [(first, end) for first, end in ends if end - first >= least]

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of `state`. Raises UserError if it belongs to other data or another seed."""
        for name in ("images", "seed"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"checkpoint: got a run with {name} {state[name]}, but this one has {getattr(self, name)}; "
                    "expected the same data and seed: use those, or --resume never"
                )
        self.epoch, self.position = state["epoch"], state["position"]
