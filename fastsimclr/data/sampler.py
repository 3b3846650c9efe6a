"""The order of the images, their division among the ranks, and the position within an epoch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.params import epoch_order
from fastsimclr.errors import UserError


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

    def remaining(self) -> list[NDArray[np.int64]]:
        """Return this rank's image indices for each batch of the epoch from `position` on."""
        order = epoch_order(self.seed, self.epoch, self.images) if self.shuffle else np.arange(self.images)
        return [
            np.array_split(order[first:end], self.world_size)[self.rank] for first, end in self._bounds(self.position)
        ]

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
