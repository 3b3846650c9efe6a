"""Work that one rank of each node does for the others, such as listing files: `run_once_per_node`."""

import io
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.distributed import World, gather_objects, run_on_all_ranks

Result = TypeVar("Result")
Array = NDArray[Any]
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # tells apart nodes of the same host name


def run_once_per_node(function: Callable[[], Result], key: str | None, world: World) -> Result:
    """Call `function` on one rank of each node and return its result on all; if it raises UserError, all ranks do.

    key: what the result depends on, such as an absolute path; ranks of a node with different keys call the function
    themselves, and so do ranks whose key is None. The result must be picklable; the tensors and arrays in it are sent
    without further copies.
    """
    if world.world_size == 1:
        return function()
    nodes = gather_objects((_node(), key, world.rank if key is None else None), world)
    caller, *others = (rank for rank, node in enumerate(nodes) if node == nodes[world.rank])
    result = run_on_all_ranks(lambda: function() if world.rank == caller else None, world)
    if world.rank != caller:
        return cast(Result, _receive(caller))
    for rank in others:
        _send(result, rank)
    return cast(Result, result)


def _node() -> tuple[str, str]:
    """Return what only processes that see the same files have in common: two containers have different host names."""
    return socket.gethostname(), _BOOT_ID.read_text() if _BOOT_ID.exists() else ""


def _send(value: Any, rank: int) -> None:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    layouts = [(array.dtype, array.shape) for array in pickler.arrays]
    dist.send_object_list([file.getvalue(), layouts], dst=rank, device=torch.device("cpu"))
    for array in pickler.arrays:
        dist.send(_as_bytes(array), dst=rank)


def _receive(rank: int) -> Any:
    received: list[Any] = [None, None]
    dist.recv_object_list(received, src=rank, device=torch.device("cpu"))
    pickled, layouts = received
    arrays = [np.empty(shape, dtype) for dtype, shape in layouts]
    for array in arrays:
        dist.recv(_as_bytes(array), src=rank)
    return _Unpickler(io.BytesIO(pickled), arrays).load()


def _as_bytes(array: Array) -> Tensor:
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


class _Pickler(pickle.Pickler):
    """Leaves tensors and arrays of numbers out, and lists them in `arrays`."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.arrays: list[Array] = []

    def persistent_id(self, value: Any) -> tuple[int, bool] | None:
        is_tensor = isinstance(value, Tensor)
        if not is_tensor and not (isinstance(value, np.ndarray) and value.dtype.kind in "iuf" and value.size):
            return None
        self.arrays.append(np.ascontiguousarray(value.numpy() if is_tensor else value))
        return len(self.arrays) - 1, is_tensor


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arrays: list[Array]) -> None:
        super().__init__(file)
        self._arrays = arrays

    def persistent_load(self, key: tuple[int, bool]) -> Array | Tensor:
        index, is_tensor = key
        return torch.from_numpy(self._arrays[index]) if is_tensor else self._arrays[index]
