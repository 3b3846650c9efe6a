"""Ranks and collectives: what one process needs to know of the others, and how it exchanges rows with them."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastsimclr.errors import UserError
from fastsimclr.profiling import stage

Result = TypeVar("Result")

# Custom operators take no process group as an argument, only strings: every group that a loss has seen, by its name.
_groups: dict[str, dist.ProcessGroup] = {}


@dataclass(frozen=True)
class World:
    """The place of this process among all: `rank` of `world_size`, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


SINGLE_PROCESS = World(0, 1, torch.device("cpu"))
"""This process and no other, on the CPU."""


def start(device: str) -> World:
    """Join the processes that torchrun started (or stand alone), on `device` ("auto", "cpu", "cuda", "cuda:1").

    Under torchrun each rank takes the GPU of its LOCAL_RANK; collectives go through nccl for tensors on a GPU and
    through gloo for tensors on the CPU, so that flags can be exchanged without touching the GPU.
    Raises UserError if the device is not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device: got {device!r}, expected auto, cpu or cuda")
    chosen = torch.device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if chosen.type == "cuda":
        index = chosen.index
        if index is None:
            index = int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device: got cuda:{index}, but {torch.cuda.device_count()} CUDA devices are visible; "
                "start fewer processes per machine or use --device cpu"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=chosen if chosen.type == "cuda" else None)
    return World(rank=int(os.environ.get("RANK", "0")), world_size=world_size, device=chosen)


def stop() -> None:
    """Leave the process group, if there is one."""
    _groups.clear()  # a group that is held has threads until the interpreter has gone
    if dist.is_initialized():
        dist.destroy_process_group()


def resolve_group(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """The process group meant by `group`: None for a process alone (no group, or "world" without torch.distributed)."""
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


def group_name(group: dist.ProcessGroup | None) -> str:
    """A name for `group` that `group_of` finds again; "" for None."""
    if group is None:
        return ""
    _groups[group.group_name] = group
    return group.group_name


def group_of(name: str) -> dist.ProcessGroup:
    """The group that `group_name` gave this name."""
    return _groups[name]


def gather_sizes(size: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """`size` of every rank, in the order of ranks.

    Goes through the CPU where the group has a backend for it (gloo): on a GPU-only group this waits for the GPU.
    """
    has_cpu_backend = "cpu" in {d.type for d in group._device_types}
    with stage("gather"):
        mine = torch.tensor([size], device="cpu" if has_cpu_backend else device)
        sizes = mine.new_empty(dist.get_world_size(group))
        dist.all_gather_into_tensor(sizes, mine, group=group)
        return [int(s) for s in sizes.tolist()]


def all_gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of every rank, one rank after the other: (n_r, ...) on each to (sum of n_r, ...) on all. No gradient.

    sizes: n_r of every rank. Uneven ranks are padded to the largest for the exchange.
    """
    return start_gather_rows(rows, sizes, group)()


def start_gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """all_gather_rows that goes on in the background: call what this returns for the result. Leave `rows` alone."""
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
        work = dist.all_gather_into_tensor(gathered, padded, group=group, async_op=True)

    def wait() -> Tensor:
        assert work is not None  # this process is of the group
        with stage("gather"):
            work.wait()
            if min(sizes) == largest:
                return gathered
            return torch.cat([chunk[:size] for chunk, size in zip(gathered.split(largest), sizes, strict=True)])

    return wait


class _GatherRows(torch.autograd.Function):
    """all_gather_rows whose backward adds what every rank's loss sends to this rank's rows.

    Four projects forgot that sum: their gradients came out W times too small.
    """

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
    """all_gather_rows, differentiable: the gradient is that of the sum of all ranks' losses."""
    return _GatherRows.apply(rows, sizes, group)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of `x` over the ranks of `group`, differentiable (the gradient is summed over ranks, too)."""
    return _SumOverRanks.apply(x, group)


def broadcast_object(value: Any, world: World) -> Any:
    """The first rank's `value`, on all ranks (any picklable object)."""
    if world.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's `value` in the order of ranks, on all ranks (any picklable object)."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(failure: str | None, world: World) -> None:
    """Raise UserError on all ranks if any has failed, with the first rank's reason that there is."""
    failures = [f for f in gather_objects(failure, world) if f is not None]
    if failures:
        raise UserError(failures[0])


def run_on_all_ranks(part: Callable[[], Result], world: World) -> Result:
    """The result of a part that has no collective in it: a rank that fails must not leave the others waiting.

    Raises UserError on all ranks if it does on any.
    """
    failure, result = None, None
    try:
        result = part()
    except UserError as error:
        failure = str(error)
    raise_on_all_ranks(failure, world)
    return cast(Result, result)
