"""run_once_per_node: one rank of a node does the work, and the others get its result."""

from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks

from fastsimclr.data.names import Names
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.errors import UserError
from fastsimclr.node import run_once_per_node


def results_of_rank(rank: int) -> list[Any]:
    world = World(rank, 3, SINGLE_PROCESS.device)

    def shared(key: str | None) -> Any:
        return run_once_per_node(lambda: rank, key, world)

    def fail() -> None:
        raise UserError(f"of rank {rank}")

    value = {
        "names": Names.of(["a", "caf\udce9", ""]),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "empty": np.zeros((0, 2), np.int64),
        "pixels": torch.arange(4, dtype=torch.uint8),
        "texts": np.array(["x", "yz"]),
    }
    received = run_once_per_node(lambda: value, "key", world)
    assert list(received["names"]) == list(value["names"])
    for name in ("transposed", "empty", "texts"):
        assert np.array_equal(received[name], value[name])
        assert received[name].dtype == value[name].dtype
    assert torch.equal(received["pixels"], value["pixels"])
    received["transposed"][:] = 0  # it is writable
    try:
        run_once_per_node(fail, "key", world)
        error = ""
    except UserError as caught:
        error = str(caught)
    return [shared("key"), shared(f"key {min(rank, 1)}"), shared("key" if rank else None), shared(None), error]


@pytest.mark.slow
def test_the_lowest_rank_of_equal_key_calls_the_function() -> None:
    assert run_ranks(3, results_of_rank) == [
        [0, 0, 0, 0, "of rank 0"],
        [0, 1, 1, 1, "of rank 0"],
        [0, 1, 1, 2, "of rank 0"],
    ]


def test_single_process_calls_the_function() -> None:
    assert run_once_per_node(lambda: 5, "key", SINGLE_PROCESS) == 5
