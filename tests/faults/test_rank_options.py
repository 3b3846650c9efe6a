"""Ranks that are started with different options: all end with exit code 2 and one line that names the option."""

from dataclasses import asdict
from pathlib import Path

import pytest
from faults.runs import TINY, Process, fork, free_port
from ranks import run_ranks

from fastsimclr.config import parse
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.errors import UserError
from fastsimclr.training.options_check import check_ranks

DIFFERENT = [
    *("optim.lr=0.01", "optim.clip_grad=1", "seed=5", "loss.temperature=0.5", "loss.decoupled=true", "batch_size=8"),
    *("micro_batch_size=4", "epochs=3", "max_steps=1", "precision=fp64", "data.image_size=16", "data.drop_last=true"),
    *("data.backend=torchvision", "data.train=photos", "data.val=0.5", "data.per_view=[{},{hue: 0.1}]", "model.out=4"),
    *("model.sync_bn=false", "knn_every=1", "checkpoint_every=2", "resume=never", "output=other"),
]
OF_NODE = ["data.workers=1", "data.cache=/tmp", "data.local_cache=/tmp", "data.local_cache_gb=1", "device=cpu"]
OF_NODE += ["data.train=/node1/images", "data.val=/node1/val"]


def errors_on_a_rank(rank: int) -> list[str]:
    """Return the errors if rank 1 has other values of all of DIFFERENT, and of OF_NODE; "" if there is none."""
    common, errors = ["--data.train=/node0/images", "--data.val=/node0/val"], []
    for options in (DIFFERENT, OF_NODE):
        own = [*common, *(f"--{option}" for option in options)] if rank == 1 else common
        try:
            check_ranks(asdict(parse(own)), World(rank, 2, SINGLE_PROCESS.device))
            errors.append("")
        except UserError as error:
            errors.append(str(error))
    return errors


def test_every_option_is_compared_but_those_of_a_node() -> None:
    (different, same), second = run_ranks(2, errors_on_a_rank)
    assert second == [different, same]
    assert all(f"--{option.split('=')[0]} " in different for option in DIFFERENT)
    assert "on rank 1" in different
    assert same == ""


def start_ranks(run: Path, *options_of_rank_1: str) -> list[Process]:
    """Start two ranks, without torchrun, which would end one when the other has ended."""
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    options = [*TINY, f"--output={run}"]
    return [fork(*options, *(options_of_rank_1 * rank), RANK=str(rank), **address)[0] for rank in range(2)]


@pytest.mark.parametrize("option", ["--batch_size=8", "--optim.lr=0.01"])
def test_ranks_end_together_and_name_the_option(option: str, tmp_path: Path) -> None:
    ranks = start_ranks(tmp_path / "run", option)
    assert [rank.wait() for rank in ranks] == [2, 2]
    (line,) = [line for rank in ranks for line in rank.errors.splitlines() if "error" in line]
    name, value = option.split("=")
    assert line.startswith(f"fastsimclr.train: error: ranks: got {name} {value} instead of ")
    assert "on rank 1" in line
    assert not (tmp_path / "run").exists()
