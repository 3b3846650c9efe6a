"""Runs that are killed, changed or damaged between two starts: the resumed run is the run that would have been."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from faults.runs import TINY, fork
from weights import metrics, steps

from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.report import main as report
from fastsimclr.run_folder import RunFolder

NOISY = """
import random, time
import numpy as np
import torch
from tiny import Tiny

class Noisy(Tiny):
    def forward(self, images):
        if not self.training:
            time.sleep(0.02)  # kNN takes seconds
            return super().forward(images)
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return super().forward(images) * (1 + 0.1 * noise)
"""


@pytest.fixture
def noisy(tmp_path: Path) -> str:
    """An encoder that draws from the generators of Python, NumPy and PyTorch, and takes long to evaluate."""
    (tmp_path / "noisy.py").write_text(NOISY)
    (tmp_path / "tiny.py").symlink_to(Path(__file__).with_name("tiny.py"))
    return f"--model.encoder={tmp_path / 'noisy.py'}:Noisy"


def run(*options: str, output: Path, ranks: int = 1) -> str:
    """Run the command to its end, and return its standard output."""
    processes = fork(*TINY, *options, f"--output={output}", ranks=ranks)
    outputs = [process.end() for process in processes]
    return outputs[0]


def error(*options: str, output: Path) -> tuple[str, str]:
    """Run the command, which must fail with one line, and return its standard output and this line."""
    (process,) = fork(*TINY, *options, f"--output={output}")
    assert process.wait() == 2, process.errors
    (line,) = process.errors.splitlines()
    return process.output, line


def assert_same(one: Path, other: Path) -> None:
    """Fail unless the runs have the same steps, kNN accuracies and, bit for bit, weights."""
    names = "step", "epoch", "loss", "lr", "knn_accuracy"
    first, second = ([{name: line.get(name) for name in names} for line in metrics(run)] for run in (one, other))
    assert first == second
    models = [load_checkpoint(RunFolder(run).checkpoint)["model"] for run in (one, other)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_kill_in_the_final_knn_loses_no_accuracy(tmp_path: Path, noisy: str) -> None:
    options = [noisy, "--max_steps=4", "--knn_every=1", "--checkpoint_every=100"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    (process,) = fork(*TINY, *options, f"--output={killed}")
    checkpoint, deadline = RunFolder(killed).checkpoint, time.monotonic() + 120
    while not checkpoint.exists():  # written before kNN
        assert time.monotonic() < deadline, process.errors
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not any("knn_accuracy" in line for line in metrics(killed)), "it was killed too late"
    said = run(*options, output=killed)
    assert "at step 4" in said
    assert [line["step"] for line in metrics(killed) if "knn_accuracy" in line] == [4]
    run(*options, output=whole)
    assert_same(killed, whole)
    assert "nothing to do" in run(*options, output=killed)


def test_another_number_of_ranks_and_workers_trains_on_the_same_images(tmp_path: Path) -> None:
    # A step of two ranks is that of one in float64, but for rounding. The loss depends on every image of the batch.
    options = ["--precision=fp64", "--data.backend=torchvision", "--optim.warmup_epochs=0"]
    for last, workers, ranks in ((3, 0, 1), (5, 2, 2), (7, 1, 1)):
        more = [f"--max_steps={last}", f"--data.workers={workers}"]
        said = run(*options, *more, output=tmp_path / "changed", ranks=ranks)
    assert "resume: ranks was 2, is 1: taken" in said
    assert "resume: --data.workers was 2, is 1: taken" in said
    run(*options, "--max_steps=7", "--data.workers=0", output=tmp_path / "whole")
    changed, whole = (steps(tmp_path / name) for name in ("changed", "whole"))
    assert [line["step"] for line in changed] == list(range(1, 8))
    assert [line["loss"] for line in changed] == pytest.approx([line["loss"] for line in whole], abs=1e-8)


def test_changed_options_are_listed_and_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("--max_steps=2", "--optim.name=sgd", output=folder)
    before = RunFolder(folder).metrics.read_bytes()
    changes = ["--optim.name=sgd", "--max_steps=4", "--optim.momentum=0.5", "--seed=3", "--data.hue=0.1"]
    said, line = error(*changes, output=folder)
    assert "resume: --max_steps was 2, is 4: taken\n" in said
    for change in ("--optim.momentum was 0.9, is 0.5", "--seed was 0, is 3", "--data.hue was 0.2, is 0.1"):
        assert f"resume: {change}: refused without --resume_changed\n" in said
        assert change in line
    assert "--max_steps" not in line
    assert RunFolder(folder).metrics.read_bytes() == before

    said = run(*changes, "--resume_changed", output=folder)
    assert "resume: --seed was 0, is 3: taken" in said
    state = load_checkpoint(RunFolder(folder).checkpoint)
    assert {group["momentum"] for group in state["optimizer"]["param_groups"]} == {0.5}
    assert state["data"]["seed"] == 3
    assert "resume:" not in run(*changes, output=folder)

    for option, words in (("--batch_size=8", "got 8, but"), ("--model.out=4", "out 8 instead of 4")):
        assert words in error(*changes, option, "--resume_changed", output=folder)[1]


def test_saved_configuration_and_moved_images_are_no_change(tmp_path: Path) -> None:
    options = ["--data.mean=auto", "--data.std=auto", "--optim.lr=auto"]
    run(*options, "--max_steps=1", output=tmp_path / "run")
    config = f"--config={tmp_path / 'run' / 'config.yaml'}"
    (process,) = fork(config, f"--output={tmp_path / 'run'}", "--max_steps=2")
    assert "resume: --max_steps was 1, is 2: taken" in process.end()
    assert process.output.count("resume:") == 1, process.output


def test_damaged_metrics_are_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    run("--max_steps=5", output=folder)
    file = RunFolder(folder).metrics
    lines = [line for line in file.read_bytes().splitlines(keepends=True) if b'"phase"' not in line]  # no heartbeats
    file.write_bytes(b"".join([lines[0], lines[1][:30] + b"\n", *lines[2:], b"\0" * 4096, b'{"step": 6, "lo']))
    assert report([str(folder), "--only_collect"]) == 0
    (process,) = fork(*TINY, "--max_steps=7", f"--output={folder}")
    process.end()
    assert "2 damaged lines" in process.errors
    assert [line["step"] for line in metrics(folder)] == [1, 3, 4, 5, 6, 7]
    assert RunFolder(folder).damaged_metrics.read_bytes().startswith(lines[1][:30] + b"\n\0\0")
    assert report([str(folder), "--only_collect", "--force"]) == 0
    assert "Traceback" not in capsys.readouterr().err
