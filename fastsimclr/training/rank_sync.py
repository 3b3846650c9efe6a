"""Exchange of batch sizes, stop signals and failures between ranks, before each step."""

import contextlib
import time
from collections.abc import Iterator

import torch

from fastsimclr.data import Batch, ViewLoader
from fastsimclr.distributed import World, all_gather, raise_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.profiling import stage
from fastsimclr.progress_bar import Phase
from fastsimclr.stopping import Stopped, StopSignal
from fastsimclr.training.checkpoint_writer import CheckpointWriter
from fastsimclr.training.progress import Progress
from fastsimclr.training.skipped import SkippedImages
from fastsimclr.training.stall import Watchdog


class RankSync:
    """Keeps the ranks in step: all train on the same batches, stop after the same step, and fail together."""

    def __init__(self, world: World, stop: StopSignal, watchdog: Watchdog) -> None:
        self.stop_signal = 0
        """The stop signal that any rank has received, TIME_LIMIT or 0; the same on all ranks."""
        self.is_stopped = False
        """Whether a stop signal, a call of `stop` or bad images on any rank end the run early; the same on all."""
        self.local_batch_sizes = [0]
        """Images of the current batch on each rank."""
        self.is_checkpoint_ready = False
        """Whether rank zero has written the checkpoint that it was writing, or has failed to; the same on all."""
        self.data_wait = 0.0
        """Seconds that this rank waited for the current batch."""
        self._world, self._stop, self._watchdog = world, stop, watchdog
        self._stop_requested = False
        self._failure: UserError | None = None
        self._any_failure = self._any_request = False

    def stop(self) -> None:
        """End the run on all ranks before the next step."""
        self._stop_requested = True

    def batches(
        self, loader: ViewLoader, progress: Progress, skipped: SkippedImages, checkpoints: CheckpointWriter
    ) -> Iterator[Batch]:
        """Yield the batches of all epochs, until the last step of the run or until a rank is to stop.

        That includes that one of them cannot read its part, and that too many images are bad: `raise_failure`.
        """
        while not (progress.is_done or self.is_stopped):
            loader.set_epoch(progress.epoch)
            with contextlib.closing(iter(loader)) as batches:
                while not progress.is_done:
                    self._watchdog.step = progress.step
                    batch = self._next(batches)
                    self._exchange_step(0 if batch is None else len(batch.index), skipped, checkpoints.is_ready)
                    if self.is_stopped:
                        return
                    if batch is None:  # resumed past the end of an epoch, which other options have made shorter
                        progress.position = loader.state_dict()
                        break
                    yield batch
                    if batch.ends_epoch:
                        break

    def poll(self, failure: UserError | None) -> None:
        """Exchange stop signals and failures between two parts of work that is not a step, such as kNN.

        Raises on all ranks: UserError if `failure` is not None on any, Stopped if any has received a stop signal.
        """
        self._failure = failure
        self._exchange()
        self.raise_failure()
        if self.stop_signal:
            self.is_stopped = True
            raise Stopped

    def raise_failure(self) -> None:
        """Raise UserError on all ranks if the run ends because of its images."""
        if self._any_failure:
            raise_on_all_ranks(self._failure, self._world)

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None at the end of the epoch, if this rank cannot read one, or after a stop signal."""
        started = time.perf_counter()
        try:
            is_first = not any(self.local_batch_sizes)  # starts the workers, which may take long
            limited = contextlib.nullcontext() if is_first else self._watchdog.limited()
            waiting = Phase("waiting for images", visible=self._world.is_rank_zero)
            with stage("data_wait"), waiting, limited, self._stop.interruptible():
                return next(batches, None)
        except UserError as error:
            self._failure = error
            return None
        except Stopped:
            return None
        finally:
            self.data_wait = time.perf_counter() - started

    def _exchange_step(self, local_batch_size: int, skipped: SkippedImages, is_checkpoint_ready: bool) -> None:
        """Exchange batch sizes, bad images and written checkpoints, and set whether any rank is to stop."""
        self.local_batch_sizes, news, ready = self._exchange(local_batch_size, skipped.news, is_checkpoint_ready)
        self.is_checkpoint_ready = any(ready)
        skipped.add(sum(self.local_batch_sizes), any(news))
        self._failure = self._failure or skipped.error
        self._any_failure = self._any_failure or skipped.error is not None
        self.is_stopped = self._any_failure or self._any_request or self.stop_signal != 0

    def _exchange(self, *values: int) -> list[list[int]]:
        """Exchange stops, failures and `values` with all ranks through the CPU, without waiting for the GPU.

        Returns each value on all ranks.
        """
        stops = [self._stop.received, self._stop.host, self._stop_requested, self._failure is not None]
        own = torch.tensor([*stops, *values])
        all_ranks = own[None]
        if self._world.world_size > 1:
            with stage("rank_wait"), Phase("waiting for the other ranks", visible=self._world.is_rank_zero):
                all_ranks = own.new_empty(self._world.world_size, len(own))
                all_gather(all_ranks, own[None])
        signals, hosts, requests, failures, *columns = all_ranks.T.tolist()
        self.stop_signal, host = max(zip(signals, hosts, strict=True))
        if self.stop_signal:
            self._stop.learn(self.stop_signal, host)
        self._any_request, self._any_failure = any(requests), any(failures)
        return columns
