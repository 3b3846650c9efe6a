"""Progress of a run."""

from dataclasses import dataclass
from typing import Any

from fastsimclr.data import Batch


@dataclass
class Progress:
    """The number of finished steps, and the loader's position after the last one."""

    position: dict[str, Any]
    """`Batch.position` of the last batch that was trained on, rather than only loaded."""
    last_step: int
    """Number of steps of the whole run."""
    step: int = 0

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0, of the next batch."""
        return int(self.position["epoch"])

    @property
    def is_done(self) -> bool:
        return self.step >= self.last_step

    def advance(self, batch: Batch) -> None:
        self.step += 1
        self.position = batch.position
