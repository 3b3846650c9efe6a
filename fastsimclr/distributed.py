"""Ranks and collectives: process group setup, and exchange of rows and objects between ranks."""

import gc
import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from fastsimclr import stopping
from fastsimclr.errors import OtherRankError, UserError
from fastsimclr.gloo import choose_interface
from fastsimclr.profiling import stage
from fastsimclr.progress_bar import Phase
from fastsimclr.slurm import set_ranks
from fastsimclr.torchrun import end_with_torchrun, without_old_keys

# torch 2.14 renamed all_gather_into_tensor, and warns about the old name on every rank.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
Result = TypeVar("Result")

_START = "start the ranks with torchrun or srun, or unset RANK and WORLD_SIZE for a run of one process"

# A rank waits this long for another, which may still be opening its data on slow storage.
_TIMEOUT = timedelta(hours=2)

# Process groups by name: custom operators accept strings as arguments, but not process groups.
_groups: dict[str, dist.ProcessGroup] = {}
_runs = itertools.count()


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of processes and the device of this process."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


SINGLE_PROCESS = World(0, 1, torch.device("cpu"))
"""A single process on the CPU."""


def all_gather(output: Tensor, part: Tensor, group: dist.ProcessGroup | None = None, *, async_op: bool = False) -> Any:
    """Gather `part` of all ranks into `output`, in the order of the ranks."""
    return getattr(dist, _ALL_GATHER)(output, part, group=group, async_op=async_op)


def start(device: str) -> World:
    """Initialize the process group if torchrun or srun started this process, and select the device.

    device: "auto", "cpu", "cuda" or "cuda:1". Each rank uses the GPU of its LOCAL_RANK, or the only one that it sees
    under srun, which may bind a GPU to each task. Collectives use nccl for tensors on a GPU and gloo for tensors on the
    CPU, so that flags can be exchanged without using the GPU.
    Raises UserError if the device is not available.
    """
    set_ranks()
    end_with_torchrun()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device: got {device!r}, expected auto, cpu or cuda")
    chosen = torch.device(device)
    world_size = _variable("WORLD_SIZE", 1, at_least=1)
    rank = _variable("RANK", None if world_size > 1 else 0)
    if rank >= world_size:
        raise UserError(f"RANK: got {rank} with WORLD_SIZE {world_size}, expected a lower rank: {_START}")
    if chosen.type == "cuda":
        index = chosen.index
        if index is None:
            is_bound = "SLURM_PROCID" in os.environ and torch.cuda.device_count() == 1
            index = 0 if is_bound else _variable("LOCAL_RANK", 0)
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device: got cuda:{index}, but {torch.cuda.device_count()} CUDA devices are visible; "
                "start fewer processes per machine or use --device cpu"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if dist.is_initialized():  # by the user's program, or by an earlier run in this process
        assert dist.group.WORLD is not None
        if "cpu" not in {d.type for d in dist.group.WORLD._device_types}:
            raise UserError(
                "process group: got one for GPUs only, expected one for CPU tensors, too: "
                'init_process_group("cpu:gloo,cuda:nccl")'
            )
        _share_stop_signals()
        return World(dist.get_rank(), dist.get_world_size(), chosen)
    if world_size > 1:
        _variable("MASTER_PORT", None)
        if not os.environ.get("MASTER_ADDR"):
            raise UserError(f"MASTER_ADDR: got no host in the environment, expected that of rank 0: {_START}")
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        with _waiting(rank):
            store, rank, world_size = next(rendezvous("env://", timeout=_TIMEOUT))
            store = without_old_keys(store, rank, world_size, _TIMEOUT)
            choose_interface(store, rank, world_size)
            dist.init_process_group(
                backend,
                device_id=chosen if chosen.type == "cuda" else None,
                timeout=_TIMEOUT,
                store=store,
                rank=rank,
                world_size=world_size,
            )
        _share_stop_signals()
    return World(rank=rank, world_size=world_size, device=chosen)


def local_world_size() -> int:
    """Return the number of ranks on this machine, which torchrun sets. Raises UserError if it is no number."""
    return _variable("LOCAL_WORLD_SIZE", 1, at_least=1)


def _variable(name: str, default: int | None, *, at_least: int = 0) -> int:
    """Return the number in an environment variable. Raises UserError if it has none, or is unset without a default."""
    text = os.environ.get(name, None if default is None else str(default))
    if text is None or not re.fullmatch(r"\d{1,9}", text) or int(text) < at_least:
        got = "no value" if text is None else repr(text)
        raise UserError(f"{name}: got {got} in the environment, expected an integer, at least {at_least}: {_START}")
    return int(text)


def _share_stop_signals() -> None:
    """Have the ranks tell each other of stop signals, through the store of the process group. Raises Stopped."""
    if dist.get_world_size() > 1:
        shared = store().clone()
        stopping.active().share(dist.PrefixStore(f"run {next(_runs)}", shared), dist.get_world_size())


@contextmanager
def _waiting(rank: int) -> Iterator[None]:
    """Name the wait for other ranks, and raise UserError if it takes too long."""
    try:
        with Phase("waiting for the other ranks", visible=rank == 0):
            yield
    except RuntimeError as error:
        if not re.search("timed out|timeout", str(error), re.IGNORECASE):
            raise
        raise UserError(
            f"ranks: got no answer from another rank ({str(error).splitlines()[0]}); expected all ranks to come this "
            "far: look for the first error, or for the slowest storage, in their logs"
        ) from error


def store() -> dist.Store:
    """Return the store of the process group."""
    return _get_default_store()


def barrier(world: World) -> None:
    """Wait for all ranks."""
    gather_objects(None, world)


def stop() -> None:
    """Destroy the process group, if there is one, and end its threads.

    The threads of a group that is still referenced would run until the interpreter exits, and then abort the process
    if one of them is just releasing a tensor.
    """
    stopping.active().stop_sharing()
    _groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # DistributedDataParallel holds the group, and is part of a reference cycle


def resolve_group(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """Return the process group, or None for a single process (None, or "world" without torch.distributed)."""
    if group is None:
        return None
    if isinstance(group, str):
        if group != "world":
            raise ValueError(f'group: got {group!r}, expected None, a process group or "world"')
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
        assert group is not None
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f'group: got {type(group).__name__}, expected None, a process group or "world"')
    return group if dist.get_world_size(group) > 1 else None


def neighbors(count: int | None, world: World) -> dist.ProcessGroup | None:
    """Return the group of this rank, of `count` neighboring ranks; None for all ranks. All ranks call it.

    Raises UserError if the ranks cannot be divided into such groups.
    """
    if count is None or count == world.world_size:
        return None
    if world.world_size % count:
        raise UserError(f"--model.bn_group: got {count}, expected a divisor of the number of ranks, {world.world_size}")
    groups = [dist.new_group(range(first, first + count)) for first in range(0, world.world_size, count)]
    return cast(dist.ProcessGroup, groups[world.rank // count])  # the one that this rank is in


def group_name(group: dist.ProcessGroup | None) -> str:
    """Register `group` for `group_of` and return its name; "" for None."""
    if group is None:
        return ""
    _groups[group.group_name] = group
    return group.group_name


def group_of(name: str) -> dist.ProcessGroup:
    """Return the group that `group_name` registered under this name."""
    return _groups[name]


def gather_sizes(size: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """Return the `size` of every rank, in rank order.

    Uses the CPU if the group has a CPU backend (gloo); otherwise this waits for the GPU.
    """
    has_cpu_backend = "cpu" in {d.type for d in group._device_types}
    with stage("gather"):
        mine = torch.tensor([size], device="cpu" if has_cpu_backend else device)
        sizes = mine.new_empty(dist.get_world_size(group))
        all_gather(sizes, mine, group=group)
        return [int(s) for s in sizes.tolist()]


def all_gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Gather the rows of all ranks, in rank order: (n_r, ...) on each to (sum of n_r, ...) on all. No gradient.

    sizes: n_r of every rank. If they differ, rows are padded to the largest for the exchange.
    """
    return start_gather_rows(rows, sizes, group)()


def start_gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Start all_gather_rows asynchronously. Returns a function that waits for the result and returns it.

    Do not modify `rows` before that.
    """
    largest = max(sizes)
    rank = dist.get_rank(group)
    assert rows.shape[0] == sizes[rank], (rows.shape, sizes, rank)
    with stage("gather"):
        rows = rows.detach()
        padded = rows.contiguous()
        if rows.shape[0] < largest:
            padded = rows.new_zeros(largest, *rows.shape[1:])
            padded[: rows.shape[0]] = rows
        gathered = rows.new_empty(largest * len(sizes), *rows.shape[1:])
        work = all_gather(gathered, padded, group=group, async_op=True)

    def wait() -> Tensor:
        assert work is not None  # None only for a process outside the group
        with stage("gather"):
            work.wait()
            if min(sizes) == largest:
                return gathered
            return torch.cat([chunk[:size] for chunk, size in zip(gathered.split(largest), sizes, strict=True)])

    return wait


class _GatherRows(torch.autograd.Function):
    """all_gather_rows whose backward sums the gradients of every rank's loss for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return all_gather_rows(rows, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.split(ctx.sizes)[dist.get_rank(ctx.group)], None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Differentiable all_gather_rows: the gradient is that of the sum of all ranks' losses."""
    return _GatherRows.apply(rows, sizes, group)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum `x` over the ranks of `group`. Differentiable: the gradient is summed over the ranks, too."""
    return _SumOverRanks.apply(x, group)


def broadcast_object(value: Any, world: World) -> Any:
    """Return rank 0's `value` (any picklable object) on all ranks."""
    if world.world_size == 1:
        return value
    values = [value]
    with _waiting(world.rank):
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Return every rank's `value` (any picklable object), in rank order, on all ranks."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    with _waiting(world.rank):
        dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(failure: Exception | None, world: World) -> None:
    """Raise on all ranks if `failure` is not None on any: the lowest failed rank raises its own.

    The others raise UserError with the same message if it is a UserError, otherwise OtherRankError.
    """
    own = None if failure is None else (isinstance(failure, UserError), type(failure).__name__, str(failure))
    failures = [(rank, *each) for rank, each in enumerate(gather_objects(own, world)) if each is not None]
    if not failures:
        return
    rank, is_user_error, name, message = failures[0]
    if failure is None or rank != world.rank:
        failure = UserError(message) if is_user_error else OtherRankError(f"rank {rank} raised {name}: {message}")
    if isinstance(failure, UserError):
        failure.on_all_ranks = True
    raise failure


def run_on_all_ranks(function: Callable[[], Result], world: World) -> Result:
    """Call `function` and return its result; if it raises UserError on one rank, raise UserError on all.

    Otherwise the other ranks would wait for the failed one in the next collective. `function` must not call
    collectives.
    """
    failure, result = None, None
    try:
        result = function()
    except UserError as error:
        failure = error
    raise_on_all_ranks(failure, world)
    return cast(Result, result)
