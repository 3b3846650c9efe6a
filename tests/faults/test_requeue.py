"""The script for SLURM in docs/cluster.md, with stand-ins for srun and scontrol."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import runs

from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.run_folder import RunFolder

DOCUMENT = Path(__file__).parents[2] / "docs" / "cluster.md"
# Runs one task, whose process id it writes to a file: SLURM signals the tasks.
SRUN = """#!/bin/bash
echo $$ > task
exec "${@:2}"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> requeued
"""


def job(folder: Path, options: list[str]) -> "subprocess.Popen[bytes]":
    """Start the script with these options of train."""
    found = re.search(r'```bash title="pretrain.sbatch"\n(.*?)```', DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    script, replaced = re.subn(
        r"(fastsimclr\.train) .*?( \|\| exit)", rf"\1 {' '.join(options)}\2", found[1], flags=re.DOTALL
    )
    assert replaced == 1
    script = script.replace("python -m", f"{sys.executable} -m").replace("runs/photos", "run")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("job", script)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "job"], cwd=folder, env=os.environ | {"PATH": path, "SLURM_JOB_ID": "4711", "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_stopped_is_requeued_and_resumes(tmp_path: Path, number: int) -> None:
    options = [*runs.TINY, "--epochs=1000", "--checkpoint_every=1e6", f"--output={tmp_path / 'run'}"]
    first = job(tmp_path, options)
    deadline = time.monotonic() + 120
    while runs.count_steps(tmp_path / "run") < 2:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(int((tmp_path / "task").read_text()), number)
    assert first.wait(60) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    step = load_checkpoint(RunFolder(tmp_path / "run").checkpoint)["step"]
    assert step >= 2

    assert job(tmp_path, [*options, f"--max_steps={step + 1}"]).wait(120) == 0
    assert runs.count_steps(tmp_path / "run") == step + 1
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n", "a run that is complete is not queued again"
