"""What the ranks of a run tell each other before each step: batch sizes, stop signals and failures."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

from fastsimclr.data import Batch, ViewLoader
from fastsimclr.distributed import World, all_gather, raise_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.profiling import stage
from fastsimclr.training.progress import Progress

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Within `with`, STOP_SIGNALS no longer end the process: the latest one is kept in `received`, 0 until then."""

    def __init__(self) -> None:
        self.received = 0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._earlier = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        self.received = number


class RankSync:
    """Keeps the ranks in step: all train on the same batch, stop after the same one, and fail together."""

    def __init__(self, world: World, stop: StopSignal) -> None:
        self.stop_signal = 0
        """The signal that told a rank to stop, or 0; the same on all ranks, as of the latest exchange."""
        self.local_batch_sizes = [0]
        """Images of the current batch on each rank."""
        self.data_wait = 0.0
        """Seconds that this rank waited for the current batch."""
        self._world, self._stop = world, stop
        self._failure: str | None = None

    def batches(self, loader: ViewLoader, progress: Progress) -> Iterator[Batch]:
        """Batches of one epoch after the other, until the run's last step or until a rank is told to stop.

        Raises UserError on all ranks if one of them cannot read its part, so that none waits in a step's collectives.
        """
        while not progress.is_done:
            loader.set_epoch(progress.epoch)
            with contextlib.closing(iter(loader)) as batches:
                while not progress.is_done:
                    batch = self._next(batches)
                    self._exchange(0 if batch is None else len(batch.index))
                    if self.stop_signal:
                        return
                    if batch is None:  # resumed after the last batch of an epoch that these options make shorter
                        progress.position = loader.state_dict()
                        break
                    yield batch
                    if batch.ends_epoch:
                        break

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None at the epoch's end, and if this rank cannot read one."""
        asked = time.perf_counter()
        try:
            with stage("data_wait"):
                return next(batches, None)
        except UserError as error:
            self._failure = str(error)
            return None
        finally:
            self.data_wait = time.perf_counter() - asked

    def _exchange(self, local_batch_size: int) -> None:
        """Tell all ranks this one's batch size, stop signal and failure. Through the CPU: the GPU is not waited for."""
        mine = torch.tensor([local_batch_size, self._stop.received, self._failure is not None])
        everyone = mine[None]
        if self._world.world_size > 1:
            with stage("rank_wait"):
                everyone = mine.new_empty(self._world.world_size, 3)
                all_gather(everyone, mine[None])
        self.local_batch_sizes, stops, failures = everyone.T.tolist()
        if any(failures):
            raise_on_all_ranks(self._failure, self._world)
        self.stop_signal = max(stops)
