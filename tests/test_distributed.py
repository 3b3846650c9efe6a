"""The end of a process group."""

from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported by DistributedDataParallel after the process group was started, it would hold the group
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastsimclr import distributed


def _threads() -> list[str]:
    return [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]


def threads_around_stop(rank: int) -> tuple[list[str], list[str]]:
    model = DistributedDataParallel(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    model.owner = [model]  # like most training programs: only the garbage collector frees it
    del model
    before = _threads()
    distributed.stop()
    return before, _threads()


@pytest.mark.slow
def test_no_thread_of_the_process_group_outlives_it() -> None:
    for before, after in run_ranks(2, threads_around_stop):
        assert any("gloo" in name for name in before)
        assert not [name for name in after if "gloo" in name]
