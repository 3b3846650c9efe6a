"""Ranks of processes that srun starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import photo_folder

from fastsimclr.errors import UserError
from fastsimclr.slurm import first_host, set_ranks

# As srun sets them for the last of five tasks on three nodes.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "node[08-10]",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
}
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANKS, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_ranks_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    set_ranks()
    assert [os.environ[name] for name in RANKS] == ["4", "5", "0", "1", "node08", "25376"]


@pytest.mark.parametrize("given", [{}, {"SLURM_STEP_NUM_TASKS": "1"}, STEP | {"WORLD_SIZE": "2"}])
def test_other_processes_are_left_alone(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_ranks()
    assert {name: os.environ[name] for name in RANKS if name in os.environ} == {
        name: value for name, value in given.items() if name in RANKS
    }


def test_incomplete_variables_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="srun: got 2 tasks, but not the variables that number them"):
        set_ranks()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("node[03-05,9],other", "node03"),
        ("node[7]", "node7"),
        ("n[2,4]-ib,x", "n2-ib"),
    ],
)
def test_first_host(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.slow
def test_tasks_of_srun_are_one_run(tmp_path: Path) -> None:
    photo_folder(tmp_path / "photos", 16)
    step = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid()), "OMP_NUM_THREADS": "1"}
    options = "--data.image_size 16 --model.encoder resnet18 --batch_size 8 --max_steps 1 --device cpu --knn_every 0"
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "fastsimclr.train", "--data.train", "photos", "--output", "run", *options.split()],
            cwd=tmp_path,
            env=os.environ | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    printed = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert "device: 2 x cpu" in printed[0]
    assert printed[1] == ""
