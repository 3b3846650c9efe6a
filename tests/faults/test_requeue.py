"""The script for SLURM in docs/reliability.md, with stand-ins for srun and scontrol."""

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

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
# As srun does, passes SIGUSR1 on to its task and returns the task's exit code.
SRUN = """#!/bin/bash
trap 'kill -USR1 $task' USR1
"$@" & task=$!
wait $task; code=$?
while kill -0 $task 2>/dev/null; do wait $task; code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
echo "$@" >> requeued
"""


def job(folder: Path, options: list[str]) -> "subprocess.Popen[bytes]":
    """Start the script with these options of train."""
    found = re.search(r'```bash title="pretrain.sbatch"\n(.*?)```', DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    script, replaced = re.subn(
        r"srun python .* &", f"srun {sys.executable} -m fastsimclr.train {' '.join(options)} &", found[1]
    )
    assert replaced == 1
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("job", script)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "job"], cwd=folder, env=os.environ | {"PATH": path, "SLURM_JOB_ID": "4711", "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_a_job_near_its_time_limit_is_requeued_and_resumes(tmp_path: Path) -> None:
    options = [*runs.TINY, "--epochs=1000", "--checkpoint_every=1e6", f"--output={tmp_path / 'run'}"]
    first = job(tmp_path, options)
    deadline = time.monotonic() + 120
    while runs.count_steps(tmp_path / "run") < 2:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(60) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    step = load_checkpoint(RunFolder(tmp_path / "run").checkpoint)["step"]
    assert step >= 2

    assert job(tmp_path, [*options, f"--max_steps={step + 1}"]).wait(120) == 0
    assert runs.count_steps(tmp_path / "run") == step + 1
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n", "a run that is complete is not queued again"
