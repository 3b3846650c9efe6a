"""Ranks of processes that srun starts: what torchrun would set in the environment, from SLURM's variables."""

import os
import re

from fastsimclr.errors import UserError

_FIRST_PORT, _PORTS = 20000, 10000


def set_ranks() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT if srun started this process.

    They are not changed if torchrun has set them, nor for a step of one task, as in a batch script. Without them, each
    task of a step would be a run of its own, in the same folder. MASTER_ADDR and MASTER_PORT that are set are kept.
    Raises UserError if SLURM's variables are incomplete.
    """
    step = os.environ
    if "WORLD_SIZE" in step or int(step.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    try:
        tasks_of_node = _expand(step["SLURM_STEP_TASKS_PER_NODE"])[int(step["SLURM_NODEID"])]
        ranks = {
            "RANK": step["SLURM_PROCID"],
            "WORLD_SIZE": step["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": step["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(tasks_of_node),
            "MASTER_ADDR": step.get("MASTER_ADDR") or first_host(step["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": step.get("MASTER_PORT") or _port(step["SLURM_JOB_ID"], step["SLURM_STEP_ID"]),
        }
    except (LookupError, ValueError) as error:
        raise UserError(
            f"srun: got {step['SLURM_STEP_NUM_TASKS']} tasks, but not the variables that number them ({error!r}); "
            "expected SLURM's environment: start the tasks with srun, or use torchrun"
        ) from error
    os.environ.update(ranks)


def first_host(hosts: str) -> str:
    """Return the first host of a SLURM host list: node03 of "node[03-05,9],other"."""
    first = re.match(r"([^,\[]*)(?:\[([^,\-\]]*)[^\]]*\]([^,]*))?", hosts)
    assert first is not None  # every string matches
    return "".join(part or "" for part in first.groups())


def _expand(counts: str) -> list[int]:
    """Return the tasks of each node: [2, 2, 1] of "2(x2),1"."""
    expanded = []
    for part in counts.split(","):
        count, _, nodes = part.partition("(x")
        expanded += [int(count)] * int(nodes.rstrip(")") or 1)
    return expanded


def _port(job: str, step: str) -> str:
    """Return a port that other steps on the same node are unlikely to have."""
    return str(_FIRST_PORT + (int(job) * 16 + int(step)) % _PORTS)
