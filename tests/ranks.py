"""Run a function on several gloo ranks, each in its own process, as torchrun does on CPUs.

    def per_rank(rank: int, batches: list[Tensor]) -> Tensor:     # at module level: pickled by name
        return nt_xent(*batches[rank], group="world").detach()    # torch.distributed is initialized

    losses = run_ranks(2, per_rank, batches)                      # [rank 0's result, rank 1's]

Starting the ranks takes a few seconds (each imports torch): put many cases into one function.
"""

import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(RuntimeError):
    """A rank raised, died or timed out. The message holds its traceback; the rank's exception is the cause."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 300.0) -> list[Any]:
    """Return the results of function(rank, *args) on `world_size` ranks, in rank order.

    function, args and results must be picklable; tensors are copied, and results are on the CPU. Each rank is a new
    process with one torch thread. Raises RankError as soon as a rank fails or when the timeout is reached; the other
    ranks, which may wait in a collective forever, are then killed. Before the timeout, which is long, as a busy machine
    may take minutes to start them, each rank prints its stacks.
    """
    context = multiprocessing.get_context("spawn")  # forking after torch has started threads may hang
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, world_size, folder, timeout_seconds, function, args))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder), time.monotonic() + timeout_seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        return [pickle.loads(_result_file(Path(folder), rank).read_bytes())[1] for rank in range(world_size)]


def _wait(processes: list[Any], folder: Path, deadline: float) -> None:
    running = dict(enumerate(processes))
    while running:
        multiprocessing.connection.wait(
            [process.sentinel for process in running.values()], timeout=max(0.0, deadline - time.monotonic())
        )
        ended = [rank for rank, process in running.items() if not process.is_alive()]
        # Report the first rank that raised: the others fail because it left.
        results = (_result_file(folder, rank) for rank in ended)
        for path in sorted((path for path in results if path.exists()), key=os.path.getmtime):
            failed, result = pickle.loads(path.read_bytes())
            if failed:
                text, error = result
                raise RankError(f"{path.name} of {len(processes)} raised:\n{text}") from error
        for rank in ended:
            if not _result_file(folder, rank).exists():
                raise RankError(f"rank {rank} of {len(processes)} died with exit code {processes[rank].exitcode}")
            del running[rank]
        if running and not ended and time.monotonic() >= deadline:
            raise RankError(f"ranks {sorted(running)} of {len(processes)} had not finished at the timeout")


def _result_file(folder: Path, rank: int) -> Path:
    return folder / f"rank {rank}"


def _rank(
    rank: int, world_size: int, folder: str, timeout_seconds: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Entry point of a rank's process: writes (False, result) or (True, (traceback, exception or None)) to its file."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * timeout_seconds)
    if sys.platform == "linux":  # gloo otherwise resolves the host name, which fails in some containers
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(os.path.join(folder, "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    try:
        result = pickle.dumps((False, function(rank, *args)))
        if dist.is_initialized():  # not if the function ended it
            dist.barrier()  # no rank exits while another still communicates with it
    except BaseException as error:
        text = traceback.format_exc()
        try:
            result = pickle.dumps((True, (text, error)))
            pickle.loads(result)
        except Exception:  # the exception does not pickle: pass its traceback only
            result = pickle.dumps((True, (text, None)))
    path = _result_file(Path(folder), rank)
    path.with_suffix(".part").write_bytes(result)
    path.with_suffix(".part").rename(path)
    if dist.is_initialized():
        dist.destroy_process_group()
