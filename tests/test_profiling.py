"""Timing of a step's stages, which add up to the step and never synchronize, and the trace of --profile."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from weights import steps

from fastsimclr.config import parse
from fastsimclr.data import Batch
from fastsimclr.distributed import World
from fastsimclr.profiling import StageClock, stage
from fastsimclr.train import main
from fastsimclr.training.trainer import Trainer

SMALL = ["--config=digits", "--batch_size=32", "--data.image_size=20", "--knn_every=0", "--model.hidden=32"]


def spend(milliseconds: float) -> None:
    end = time.perf_counter() + milliseconds / 1000
    while time.perf_counter() < end:
        pass


def test_stages_add_up_to_the_step_and_exclude_nested_stages() -> None:
    clock = StageClock(torch.device("cpu"))
    with clock.running():
        with stage("data_wait"):
            spend(3)
            with stage("copy"):
                spend(20)
            spend(3)
        spend(10)
        with stage("data_wait"):
            spend(4)
    seconds, read = clock.end_step()
    stages = read()
    assert list(stages) == ["data_wait", "copy", "other"]
    assert sum(stages.values()) == pytest.approx(1000 * seconds, rel=0.02)
    for name, least in (("data_wait", 10), ("copy", 20), ("other", 10)):
        assert stages[name] >= least
    assert stages["data_wait"] < 20 + stages["copy"] / 4, "excludes the nested copy"


def test_step_starts_at_the_end_of_the_previous_one_or_at_restart() -> None:
    clock = StageClock(torch.device("cpu"))
    spend(20)
    clock.restart()
    spend(5)
    seconds, _ = clock.end_step()
    assert 0.005 <= seconds < 0.02
    spend(5)
    assert clock.end_step()[1]()["other"] >= 5


def test_stage_without_a_running_clock_is_a_no_op() -> None:
    clock = StageClock(torch.device("cpu"))
    with stage("forward"):
        spend(1)
    with pytest.raises(KeyError), clock.running(), stage("forward"):
        raise KeyError
    assert list(clock.end_step()[1]()) == ["forward", "other"], "a stage that raises ends too"
    with stage("forward"):
        spend(1)
    assert list(clock.end_step()[1]()) == ["other"]


@pytest.mark.slow
def test_profile_traces_from_the_sixth_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--data.train=digits", "--max_steps=8", f"--output={tmp_path}", "--profile"]) == 0
    assert f"trace: {tmp_path / 'trace.json.gz'}" in capfd.readouterr().out
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    # steps 6, 7 and 8
    assert [names.count(f"stage: {name}") for name in ("forward", "loss", "backward", "optimizer")] == [3, 3, 3, 3]
    assert main([*SMALL, "--data.train=digits", "--max_steps=9", f"--output={tmp_path}", "--profile"]) == 0
    assert "no trace: tracing starts 6 steps after the start" in capfd.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw", "muon"])
def test_step_on_a_gpu_never_synchronizes(tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's sync debug mode raises on any synchronization: enabled from the third step until the checkpoint."""
    options = [*SMALL, "--data.train=digits", "--max_steps=12", f"--output={tmp_path}", "--device=cuda"]
    trainer = Trainer(
        parse([*options, f"--optim.name={optimizer}", "--checkpoint_every=100"]),
        World(0, 1, torch.device("cuda", 0)),
    )
    advance, save = trainer.progress.advance, trainer.save

    def strict(batch: Batch) -> None:
        advance(batch)
        torch.cuda.set_sync_debug_mode("error" if trainer.progress.step >= 2 else "default")

    def lenient() -> None:
        torch.cuda.set_sync_debug_mode("default")
        save()

    monkeypatch.setattr(trainer.progress, "advance", strict)
    monkeypatch.setattr(trainer, "save", lenient)
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stages = [record["stages_ms"] for record in steps(tmp_path)]
    assert len(stages) == 12
    assert all(times["backward"] > 0 for times in stages)
