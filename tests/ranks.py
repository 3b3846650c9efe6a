"""Run a function on several gloo ranks, each a process of its own, as torchrun would start them on CPUs.

    def per_rank(rank: int, batches: list[Tensor]) -> Tensor:     # at module level: it travels to the ranks by name
        return nt_xent(*batches[rank], group="world").detach()    # torch.distributed is initialised

    losses = run_ranks(2, per_rank, batches)                      # [rank 0's result, rank 1's]

A start costs a few seconds (each rank imports torch): put many cases into one function.
"""

import datetime
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
    """A rank raised, died or did not finish; the message holds its traceback. The rank's own exception is the cause."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """Results of function(rank, *args) on `world_size` ranks, in their order.

    function, args and results must pickle; tensors are copied, and a result lies on the CPU. Each rank is a fresh
    process with one torch thread. Raises RankError as soon as a rank fails, and when they have not all finished in
    time; the other ranks, which may wait in a collective for ever, are then killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process in which torch's threads have run may hang
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
        return [pickle.loads(_answer(Path(folder), rank).read_bytes())[1] for rank in range(world_size)]


def _wait(processes: list[Any], folder: Path, deadline: float) -> None:
    running = dict(enumerate(processes))
    while running:
        multiprocessing.connection.wait(
            [process.sentinel for process in running.values()], timeout=max(0.0, deadline - time.monotonic())
        )
        ended = [rank for rank, process in running.items() if not process.is_alive()]
        # The first to raise is the one to report: the others fail because it left.
        answers = sorted((p for p in (_answer(folder, rank) for rank in ended) if p.exists()), key=os.path.getmtime)
        for path in answers:
            failed, result = pickle.loads(path.read_bytes())
            if failed:
                text, error = result
                raise RankError(f"{path.name} of {len(processes)} raised:\n{text}") from error
        for rank in ended:
            if not _answer(folder, rank).exists():
                raise RankError(f"rank {rank} of {len(processes)} died with exit code {processes[rank].exitcode}")
            del running[rank]
        if running and not ended and time.monotonic() >= deadline:
            raise RankError(f"ranks {sorted(running)} of {len(processes)} had not finished at the timeout")


def _answer(folder: Path, rank: int) -> Path:
    return folder / f"rank {rank}"


def _rank(
    rank: int, world_size: int, folder: str, timeout_seconds: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """What a rank's process runs: leaves (False, result) or (True, (traceback, exception or None)) in its file."""
    torch.set_num_threads(1)
    if sys.platform == "linux":  # gloo would otherwise look the host's name up, which not every container can
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(os.path.join(folder, "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    try:
        answer = pickle.dumps((False, function(rank, *args)))
        dist.barrier()  # nobody leaves while another still talks to it
    except BaseException as error:
        text = traceback.format_exc()
        try:
            answer = pickle.dumps((True, (text, error)))
            pickle.loads(answer)
        except Exception:  # an exception that does not pickle: its traceback must do
            answer = pickle.dumps((True, (text, None)))
    path = _answer(Path(folder), rank)
    path.with_suffix(".part").write_bytes(answer)
    path.with_suffix(".part").rename(path)
    dist.destroy_process_group()
