"""A run whose newest checkpoint is damaged warns, takes the one before, and is the run that it would have been."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.runs import LONG, TINY, fork
from faults.tiny import Tiny

from fastsimclr import UserError, load_encoder
from fastsimclr.checkpoint_format import load_checkpoint, write_checkpoint
from fastsimclr.config import parse
from fastsimclr.distributed import SINGLE_PROCESS
from fastsimclr.run_folder import RunFolder
from fastsimclr.training.trainer import Trainer

OPTIONS = [*TINY, "--checkpoint_every=0.5", "--max_steps=150"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of 150 steps, and the same one stopped at step 135, whose checkpoints are of steps 135 and 90."""
    folder = tmp_path_factory.mktemp("runs")
    processes = [*fork(*OPTIONS, f"--output={folder / 'whole'}")]
    processes += fork(*OPTIONS[:-1], "--max_steps=135", f"--output={folder / 'short'}")
    for process in processes:
        process.end()
    return folder / "whole", folder / "short"


def copy_of(runs: tuple[Path, Path], folder: Path) -> RunFolder:
    shutil.copytree(runs[1], folder)
    return RunFolder(folder)


def test_damaged_checkpoints_are_found_and_the_one_before_is_taken(runs: tuple[Path, Path], tmp_path: Path) -> None:
    flips, truncations = (200, 50) if LONG else (60, 15)
    run = copy_of(runs, tmp_path / "run")
    good = run.checkpoint.read_bytes()
    rng = np.random.default_rng(0)
    for number in range(flips + truncations):
        damaged = bytearray(good)
        if number < flips:
            bit = int(rng.integers(0, 8 * len(good)))
            damaged[bit // 8] ^= 1 << bit % 8
        else:
            del damaged[int(rng.integers(0, len(good))) :]
        run.checkpoint.write_bytes(damaged)
        newest, (problem,) = run.newest_checkpoint()
        assert newest is not None
        assert newest.path == run.previous_checkpoint
        assert problem.startswith(f"{run.checkpoint}: got a ")
        assert "\n" not in problem
    assert load_checkpoint(run.previous_checkpoint)["step"] == 90


@pytest.mark.parametrize("damage", ["flipped", "torn", "empty", "foreign", "missing", "both"])
def test_a_run_resumes_from_the_one_before(runs: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    run = copy_of(runs, tmp_path / "run")
    data = run.checkpoint.read_bytes()
    if damage == "flipped":
        run.checkpoint.write_bytes(data[:2000] + bytes([data[2000] ^ 4]) + data[2001:])
    elif damage == "torn":
        run.checkpoint.write_bytes(data[: len(data) // 2])
    elif damage == "foreign":
        torch.save({"model": {}, "step": 135}, run.checkpoint)
    elif damage == "missing":
        run.checkpoint.unlink()
    else:
        run.checkpoint.write_bytes(b"")
    (run.checkpoint.parent / "last.pt.partial").write_bytes(data[:999])  # of a process that was killed
    if damage == "both":
        run.previous_checkpoint.write_bytes(data[:-1])
        (process,) = fork(*OPTIONS, f"--output={run}")
        assert process.wait() == 2
        (line,) = [line for line in process.errors.splitlines() if "error" in line]
        assert line.startswith(f"fastsimclr.train: error: {run.checkpoint}: got a file without the checksum")
        assert line.endswith("to start again, use another --output or --resume never")
        return

    (process,) = fork(*OPTIONS, f"--output={run}")
    assert f"resumed from {run.previous_checkpoint} at step 90" in process.end()
    warned = f"warning: {run.checkpoint}: got a " in process.errors
    assert warned == (damage != "missing")
    assert f"using {run.previous_checkpoint} instead" in process.errors or not warned
    ours, expected = (load_checkpoint(folder.checkpoint) for folder in (run, RunFolder(runs[0])))
    assert ours["step"] == 150
    assert all(torch.equal(ours["model"][name], value) for name, value in expected["model"].items())
    assert load_checkpoint(run.previous_checkpoint)["step"] == 135
    assert sorted(file.name for file in run.checkpoint.parent.iterdir()) == ["last.pt", "previous.pt"]


def resume(file: Path, output: Path) -> None:
    """Resume from a file in this process, as --resume does: only a file that passes the first check needs a trainer."""
    load_checkpoint(file)
    Trainer(parse([*OPTIONS, f"--output={output}", f"--resume={file}"]), SINGLE_PROCESS)


def test_every_whole_but_wrong_checkpoint_is_one_line(runs: tuple[Path, Path], tmp_path: Path) -> None:
    state = load_checkpoint(runs[1] / "checkpoints" / "last.pt")
    weights, optimizer, data = state["model"], state["optimizer"], state["data"]
    name, tensor = next(iter(weights.items()))
    (group,) = optimizer["param_groups"]
    architecture = state["architecture"]
    spec = architecture["encoder"]
    changes: list[dict[str, object]] = [
        {"step": -5},
        {"step": "135"},
        {"batch_size": 32},
        {"format": 1},
        {"surplus": 0},
        {"model": {}},
        {"model": weights | {name: tensor[:1]}},
        {"model": weights | {name: tensor.long()}},
        {"model": {f"module.{key}": value for key, value in weights.items()}},
        {"architecture": architecture | {"encoder": spec | {"channels": 1}}},
        {"architecture": architecture | {"out": 16}},
        {"architecture": architecture | {"optimizer": "adamw"}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"optimizer": optimizer | {"state": {0: {"exp_avg": tensor, "exp_avg_sq": tensor}}}},
        {"optimizer": optimizer | {"state": {0: {"momentum_buffer": tensor[:1]}}}},
        {"optimizer": optimizer | {"state": {999: {"momentum_buffer": tensor}}}},
        {"optimizer": optimizer | {"param_groups": [{"params": group["params"], "lr": 0.1}]}},
        {"optimizer": optimizer | {"param_groups": [group | {"params": group["params"][1:]}]}},
        {"grad_scaler": {"scale": -1.0}},
        {"data": data | {"images": 7}},
        {"data": data | {"position": -16}},
        {"data": {"epoch": 0}},
        {"skipped_images": {"seen": 0, "bad": {}}},
        {"callbacks": [("KeepCheckpoints", {})]},
        {"callbacks": 3},
        {"untrained_knn": float("nan")},
        {"unfinished_epoch": {"step": 135}},
        {"config": 5},
    ]
    file = tmp_path / "wrong.pt"
    for change in changes:
        write_checkpoint(state | change, file)
        with pytest.raises(UserError, match=r"got .*expected") as raised:
            resume(file, tmp_path / "run")
        assert "\n" not in str(raised.value), change


def test_load_encoder_takes_the_one_before_with_a_warning(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy_of(runs, tmp_path / "run")
    os.truncate(run.checkpoint, 5000)
    with pytest.warns(UserWarning, match=r"last\.pt: got a file without the checksum.*using .*previous\.pt instead"):
        encoder = load_encoder(run.path, encoder=Tiny())
    expected = load_checkpoint(run.previous_checkpoint)["model"]
    assert torch.equal(encoder.state_dict()["module.0.weight"], expected["encoder.module.0.weight"])
    with pytest.raises(UserError, match=r"last\.pt: got a file that is damaged or not a checkpoint"):
        load_encoder(run.checkpoint, encoder=Tiny())
