"""Where a step's time goes: stages that add up to the step and never make it wait, and the trace of --profile."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch

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


def test_stages_add_up_to_the_step_and_an_inner_one_counts_for_itself_alone() -> None:
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
    assert stages["data_wait"] < 20 + stages["copy"] / 4, "the copy within it is not in it"


def test_a_step_begins_where_the_last_one_ended_or_at_a_restart() -> None:
    clock = StageClock(torch.device("cpu"))
    spend(20)
    clock.restart()
    spend(5)
    seconds, _ = clock.end_step()
    assert 0.005 <= seconds < 0.02
    spend(5)
    assert clock.end_step()[1]()["other"] >= 5


def test_without_a_running_clock_a_stage_is_nothing() -> None:
    clock = StageClock(torch.device("cpu"))
    with stage("forward"):
        spend(1)
    with pytest.raises(KeyError), clock.running(), stage("forward"):
        raise KeyError
    assert list(clock.end_step()[1]()) == ["forward", "other"], "the failed one ended, too"
    with stage("forward"):
        spend(1)
    assert list(clock.end_step()[1]()) == ["other"]


def test_profile_traces_the_steps_from_the_sixth_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--data.train=digits", "--max_steps=8", f"--output={tmp_path}", "--profile"]) == 0
    assert f"trace: {tmp_path / 'trace.json.gz'}" in capfd.readouterr().out
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    # 6, 7 and 8
    assert [names.count(f"stage: {name}") for name in ("forward", "loss", "backward", "optimizer")] == [3, 3, 3, 3]
    assert main([*SMALL, "--data.train=digits", "--max_steps=9", f"--output={tmp_path}", "--profile"]) == 0
    assert "no trace: it begins at step 6 of a start" in capfd.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_a_step_on_a_gpu_never_waits_for_it(tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's debug mode raises at whatever makes the host wait: from the third step on, up to the checkpoint."""
    options = [*SMALL, "--data.train=digits", "--max_steps=12", f"--output={tmp_path}", "--device=cuda"]
    trainer = Trainer(
        *parse([*options, f"--optim.name={optimizer}", "--checkpoint_every=100"]),
        World(0, 1, torch.device("cuda", 0)),
        [],
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
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    stages = [line["stages_ms"] for line in lines if "loss" in line]
    assert len(stages) == 12
    assert all(of_step["backward"] > 0 for of_step in stages)
