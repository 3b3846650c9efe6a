"""What every loader shares: the order, the draws, the photometric op, and the place where a run stands."""

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.data.draws import Draws, draw
from fastsimclr.data.photometric import photometric
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.sources import Source
from fastsimclr.views import Views


class Batch(NamedTuple):
    """A rank's part of a batch, on the loader's device."""

    views: tuple[Tensor, ...]
    """(B, 3, H, W) of each view, normalised, channels-last."""
    index: Tensor  # type: ignore[assignment]  # a field here, not tuple's method
    """(B,) int64: which images of the source."""
    label: Tensor
    """(B,) int64; -1 where there is none."""


@dataclass(frozen=True)
class Job:
    """A batch to make: image index[i] is cropped by the draws of each view."""

    index: NDArray[np.int64]
    draws: tuple[Draws, ...]


class Front(Protocol):
    """The first half of a loader, which differs: it reads, decodes, crops, resizes and flips."""

    def crops(self, jobs: Iterator[Job]) -> Generator[tuple[Tensor, ...], None, None]:
        """For each job, in order, its views as (B, H, W, 3) uint8 on the loader's device."""
        ...

    def close(self) -> None:
        """Stop workers and give back memory."""
        ...


class ViewLoader:
    """An epoch's batches each time it is iterated over; `open_views` makes one.

    A batch depends on the source, the recipe, the seed, the epoch and its place in the order alone, so that a loader
    with the state of another goes on exactly as that one would have.
    """

    def __init__(
        self, source: Source, views: Views, sampler: Sampler, front: Front, device: torch.device, backend: str
    ) -> None:
        self.source, self.views, self.device, self.backend = source, views, device, backend
        self._sampler, self._front = sampler, front
        self._crops: Generator[tuple[Tensor, ...], None, None] | None = None  # of the latest iteration

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the position on (an epoch's start, but for a loaded state).

        A front serves one iteration at a time: a new one ends the one before, which raises RuntimeError if continued.
        """
        sampler = self._sampler
        first = sampler.position
        parts = sampler.remaining()
        epoch = sampler.epoch
        if not parts:  # resumed behind the last batch that these options leave
            sampler.epoch, sampler.position = epoch + 1, 0
        ahead: deque[Job] = deque()  # drawn for the front, which works ahead, and not yet handed out

        def jobs() -> Iterator[Job]:
            for index in parts:
                if len(index):
                    ahead.append(self._job(index, epoch))
                    yield ahead[-1]

        if self._crops is not None:
            self._crops.close()  # else the front would hand out what it has made ahead for the one before
        self._crops = crops = self._front.crops(jobs())
        try:
            for step, index in enumerate(parts, start=1):
                if self._crops is not crops:
                    raise RuntimeError("this iteration ended when a newer one of the same loader began")
                made = next(crops) if len(index) else None
                # Where to go on once this batch is used: at its end, or at the next epoch's start.
                done = step == len(parts)
                sampler.epoch = epoch + done
                sampler.position = 0 if done else first + step * sampler.batch_size
                if made is not None:
                    yield self._finish(ahead.popleft(), made)
        finally:
            crops.close()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. A position loaded or reached within that very epoch is kept."""
        if epoch != self._sampler.epoch:
            self._sampler.epoch, self._sampler.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: behind the last batch that was handed out."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the loader of `state` stood; batch size and number of ranks may differ."""
        self._sampler.load_state_dict(state)

    def close(self) -> None:
        """Stop workers and give back memory."""
        self._front.close()

    def _job(self, index: NDArray[np.int64], epoch: int) -> Job:
        seed = self._sampler.seed
        return Job(index, tuple(draw(self.views, seed, epoch, index, view) for view in range(self.views.views)))

    def _finish(self, job: Job, crops: tuple[Tensor, ...]) -> Batch:
        return Batch(
            views=tuple(photometric(crop, d, self.views) for crop, d in zip(crops, job.draws, strict=True)),
            index=torch.from_numpy(job.index).to(self.device),
            label=torch.from_numpy(self.source.labels[job.index]).to(self.device),
        )
