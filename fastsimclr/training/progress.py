"""How far a run has come."""

from dataclasses import dataclass
from typing import Any

from fastsimclr.data import Batch


@dataclass
class Progress:
    """The steps that a run has done, and the loader's position after the last of them."""

    position: dict[str, Any]
    """As of `Batch.position`: after the last batch that was trained on, not only fetched."""
    last_step: int
    """The run is done after so many steps."""
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
