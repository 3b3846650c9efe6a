"""Write the checkpoints of a run in the background."""

import errno
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsimclr import stopping
from fastsimclr.checkpoint_format import find_problem, write_checkpoint
from fastsimclr.distributed import World, broadcast_object
from fastsimclr.errors import OtherRankError, RunError
from fastsimclr.progress_bar import Phase, print_line
from fastsimclr.run_folder import RunFolder, flush, replace_atomically
from fastsimclr.sharding import map_tensors

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread of rank zero, and keeps the two newest: last.pt and previous.pt.

    Every rank has one, and all ranks call `start`, `finish` and `raise_failure` together. If a checkpoint cannot be
    written, rank zero prints why, once until one can be written again; the run continues, and the next one is tried.
    """

    def __init__(self, folder: RunFolder, world: World) -> None:
        self.saved_step = 0
        """Finished steps in the newest checkpoint of this run; 0 if there is none."""
        self._folder, self._world = folder, world
        self._newest: Path | None = None  # good checkpoint of this run, written or resumed from
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastsimclr-checkpoint")
        self._step: int | None = None  # of the checkpoint that is being written; the same on all ranks
        self._written: Future[str | None] | None = None  # only on rank zero: None, or why it was not written
        self._on_written: Callable[[Path], None] | None = None
        self._failure: str | None = None

    @property
    def is_ready(self) -> bool:
        """Whether this rank has written the checkpoint, or has failed to: `finish` will not wait."""
        return self._written is not None and self._written.done()

    def open(self) -> None:
        """Remove the incomplete files of a process that was killed."""
        if self._world.is_rank_zero:
            for partial in self._folder.checkpoint.parent.glob("*.partial"):
                partial.unlink(missing_ok=True)

    def resumed_from(self, file: Path, step: int) -> None:
        """Note which checkpoint the run resumes from, so that a good one is never replaced by a damaged one."""
        if file.parent == self._folder.checkpoint.parent:
            self._newest, self.saved_step = file, step

    def start(
        self, step: int, state: Callable[[], dict[str, Any]], on_written: Callable[[Path], None] | None = None
    ) -> None:
        """Start to write a state. If the one before is still being written, wait for it.

        state: returns what the checkpoint holds, copied; called on rank zero, before `start` returns.
        on_written: called by `finish` on all ranks with the path of the checkpoint, if it was written.
        """
        self.finish()
        self._step, self._on_written = step, on_written
        if self._world.is_rank_zero:
            copied = state()
            problem = find_problem(copied)
            assert problem is None, problem
            self._written = self._thread.submit(self._write, copied)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete, if there is one, and call `on_written`."""
        if self._step is None:
            return
        with Phase("writing the checkpoint", visible=self._world.is_rank_zero):
            failure = broadcast_object(self._written.result() if self._written else None, self._world)
        step, self._step, self._written = self._step, None, None
        if failure is None:
            self.saved_step, self._failure = step, None
            if self._on_written is not None:
                self._on_written(self._folder.checkpoint)
            return
        if self._failure is None and self._world.is_rank_zero:
            print_line(
                f"warning: {self._folder.checkpoint}: not written at step {step} ({failure}); the run continues, and "
                "tries again with the next checkpoint"
            )
        self._failure = failure

    def raise_failure(self) -> None:
        """Raise RunError on rank zero, and OtherRankError on the others, if the latest checkpoint was not written."""
        if self._failure is None:
            return
        if not self._world.is_rank_zero:
            raise OtherRankError(f"rank 0 has not written the checkpoint: {self._failure}")
        newest = f"the newest one has {self.saved_step} steps" if self.saved_step else "there is no other"
        raise RunError(
            f"{self._folder.checkpoint}: got no checkpoint of the last step ({self._failure}), {newest}; expected a "
            "disk that can be written: make room or repair it, and rerun the same command to resume"
        )

    def close(self) -> None:
        """Wait until the checkpoint that is being written is complete, and end the thread."""
        self._thread.shutdown()

    def _write(self, state: dict[str, Any]) -> str | None:
        """Replace the newest checkpoint. Returns None, or why that failed."""
        try:
            try:
                self._replace(state)
            except OSError as error:
                previous = self._folder.previous_checkpoint
                if error.errno not in _FULL_DISK or self._newest == previous or not previous.exists():
                    raise
                previous.unlink()  # to make room: the newest one is good
                self._replace(state)
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _replace(self, state: dict[str, Any]) -> None:
        last, previous = self._folder.checkpoint, self._folder.previous_checkpoint
        started = time.monotonic()
        with replace_atomically(last) as partial:
            write_checkpoint(state, partial)
            flush(partial)
            if self._newest == last and last.exists():
                self._folder.keep(last, previous)
        if self._newest not in (last, previous):  # it is of another run, which had the same folder
            previous.unlink(missing_ok=True)
        self._newest = last
        stopping.active().reserve(time.monotonic() - started)


def copy_to_cpu(value: Any) -> Any:
    """Return a copy of nested containers with their tensors in (pinned) memory of the CPU."""
    return map_tensors(_copy_to_cpu, value)


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    # Pinned memory is about ten times faster to copy to. PyTorch keeps it for the next checkpoint.
    pinned = tensor.device.type == "cuda"
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor.detach())
