"""A watch over the ranks: if one of them dies, stops, raises or hangs, all end and say which one it was, and why."""

import contextlib
import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from fastsimclr import distributed, stopping
from fastsimclr.distributed import World
from fastsimclr.errors import OtherRankError, UserError
from fastsimclr.progress_bar import current_phase, duration
from fastsimclr.run_folder import RunFolder

POLL_SECONDS = 1.0
STALL_SECONDS = 600.0
"""Default timeout of a Watchdog."""
_LOST_POLLS = 4
"""A rank that is silent for so many polls is lost if a connection has broken, too."""
_JOIN_SECONDS = 5.0
_BROKEN = re.compile("connection|broken pipe|timed out|timeout|gloo|nccl|socket", re.IGNORECASE)
"""What gloo, NCCL and the store say when another rank has gone."""


class Watchdog:
    """A context in which threads end this process, with exit code 1, if the run cannot go on.

    A single process is not watched: nothing waits for it, and a step on a CPU may take long. With several ranks, every
    rank publishes in the process group's store that it lives, and what it does. So a phase may take as long as it
    needs on one rank, while the others wait for it. These end the run:
    - a rank publishes nothing for the timeout: it has died, is stopped, or its machine is lost;
    - the part of a step that `limited` marks takes longer than the timeout on a rank;
    - a rank leaves the context with an exception other than UserError, which is raised on all ranks.
    Rank zero watches the others, and they watch rank zero. The rank that notices publishes a verdict and prints it.
    Each living rank then writes the stacks of its threads to the run's folder.

    Time is counted in polls of this process, so that a run that is suspended as a whole, by SIGSTOP or by a laptop's
    lid, goes on when it is resumed.
    """

    def __init__(self, world: World, folder: RunFolder | None = None, timeout: float = STALL_SECONDS) -> None:
        """folder: for the stacks. timeout: seconds."""
        self.step = 0
        """Steps that this rank has finished, for reports."""
        self._world, self._folder = world, folder
        self._timeout, self._polls = timeout, timeout / POLL_SECONDS
        self._beats = 0
        self._limited_polls: int | None = None
        self._unanswered_polls = 0
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: dist.Store | None = None

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Mark work of the main thread that takes less than the timeout unless it hangs."""
        self._limited_polls = 0
        try:
            yield
        finally:
            self._limited_polls = None

    def __enter__(self) -> "Watchdog":
        if self._world.world_size > 1:
            name = distributed.broadcast_object(uuid.uuid4().hex, self._world)  # a later run may have the same store
            # The connection of the original is blocked while the main thread waits.
            self._store = dist.PrefixStore(name, distributed.store().clone())
            self._publish()
            distributed.barrier(self._world)  # each rank finds what the others have published
            self._threads = [threading.Thread(target=each, daemon=True) for each in (self._exchange, self._watch)]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        is_alone = isinstance(error, Exception) and not isinstance(error, UserError | OtherRankError)
        if is_alone and self._store is not None and isinstance(error, RuntimeError) and _BROKEN.search(str(error)):
            # Another rank has gone: the thread finds out which, and ends this process.
            self._polls = min(self._polls, _LOST_POLLS)
            time.sleep(2 * _LOST_POLLS * POLL_SECONDS)
        self._ended.set()
        if is_alone and self._store is not None:
            with contextlib.suppress(RuntimeError):  # the store has gone
                self._publish_verdict(f"raised {traceback.format_exception_only(error)[-1].strip()}")
                time.sleep(2 * POLL_SECONDS)  # until the other ranks have read it: rank zero may hold the store
        for thread in self._threads:  # in a call of the store, it would abort the process when the interpreter ends
            thread.join(_JOIN_SECONDS)

    def _watch(self) -> None:
        """Watch the progress of this rank, and that the store answers the other thread."""
        while not self._ended.wait(POLL_SECONDS):
            self._unanswered_polls += 1
            if self._unanswered_polls > self._polls:
                self._end_without_store()
            if self._limited_polls is not None:
                self._limited_polls += 1
                # Later than other ranks are found silent, as this one may be waiting for them.
                if self._limited_polls > self._polls + _LOST_POLLS:
                    self._end(self._publish_verdict(f"has made no progress for {duration(self._timeout)}"))

    def _exchange(self) -> None:
        """Publish that this rank lives, and watch the others."""
        assert self._store is not None
        watched = range(1, self._world.world_size) if self._world.is_rank_zero else [0]
        silent, latest = dict.fromkeys(watched, 0), dict.fromkeys(watched, b"")
        while not self._ended.wait(POLL_SECONDS):
            try:
                self._publish()
                if self._store.check(["verdict"]):
                    self._end(self._store.get("verdict").decode())
                states = self._store.multi_get([f"rank {rank}" for rank in watched])
                self._unanswered_polls = 0
            except RuntimeError:  # from the store
                if not self._ended.wait(2 * POLL_SECONDS):  # not the end of the run, which rank zero was first to reach
                    self._end_without_store()
                return
            for rank, state in zip(watched, states, strict=True):
                silent[rank] = silent[rank] + 1 if state == latest[rank] else 0
                latest[rank] = state
                if silent[rank] > self._polls:
                    what = f"has given no sign of life for {duration(silent[rank] * POLL_SECONDS)}"
                    self._end(self._publish_verdict(what, rank, json.loads(state)))

    def _end_without_store(self) -> None:
        holder = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        verdict = f"{holder} does not answer: it was killed or stopped, or its machine or network failed"
        self._print(verdict)
        self._end(verdict)

    def _own_state(self) -> dict[str, Any]:
        phase = current_phase()
        after = f", after {self.step} steps" if self.step else ""
        return {
            "beat": self._beats,
            "phase": f"{phase[0] if phase else 'training'}{after}",
            "process": f"process {os.getpid()} on {socket.gethostname()}",
        }

    def _publish(self) -> None:
        assert self._store is not None
        self._beats += 1
        self._store.set(f"rank {self._world.rank}", json.dumps(self._own_state()))

    def _publish_verdict(self, what: str, rank: int | None = None, state: dict[str, Any] | None = None) -> str:
        """Publish and print why the run ends, unless another rank already has. Returns the verdict of the first.

        what: said of `rank`, whose latest `state` is added; they default to this rank's.
        """
        state = state or self._own_state()
        verdict = (
            f"rank {self._world.rank if rank is None else rank} ({state['process']}) {what}; phase: {state['phase']}"
        )
        if self._store is not None:
            first = self._store.compare_set("verdict", "", verdict).decode()
            if first != verdict:
                return first
        self._print(verdict)
        return verdict

    def _print(self, verdict: str) -> None:
        stacks = "" if self._folder is None else f"; stacks: {self._folder.stacks}"
        print(f"{stopping.active().program}: error: {verdict}{stacks}", file=sys.stderr, flush=True)

    def _end(self, verdict: str) -> None:
        """End this process, unless it has left the context."""
        if self._ended.is_set():
            return
        # In another thread, as the file system may hang.
        writer = threading.Thread(target=self._write_stacks, args=(verdict,), daemon=True)
        writer.start()
        writer.join(_LOST_POLLS * POLL_SECONDS)
        time.sleep(2 * POLL_SECONDS)  # until the other ranks have read the verdict: rank zero may hold the store
        os._exit(1)

    def _write_stacks(self, verdict: str) -> None:
        if self._folder is not None:
            self._folder.stacks.mkdir(parents=True, exist_ok=True)
            with open(self._folder.stacks / f"rank-{self._world.rank}.txt", "w") as file:
                print(f"{verdict}\n", file=file, flush=True)
                faulthandler.dump_traceback(file)
