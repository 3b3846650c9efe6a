"""The heartbeat of a run, and what `doctor --run` makes of it."""

import json
import resource
import time
from pathlib import Path

import pytest

from fastsimclr.doctor import main
from fastsimclr.metrics_file import read_records
from fastsimclr.progress_bar import Phase, current_phase
from fastsimclr.reporting import run_status
from fastsimclr.reporting.run_status import RunStatus, read_status
from fastsimclr.run_folder import RunFolder
from fastsimclr.training import heartbeat
from fastsimclr.training.metrics import RunLog

RECORD = {"epoch": 0, "loss": 1.5, "lr": 0.1, "step_ms": 250.0, "images": 64}


def test_phases_are_known_on_every_rank() -> None:
    assert current_phase() is None
    with Phase("outer", visible=False), Phase("inner", visible=False):
        phase = current_phase()
        assert phase is not None
        title, seconds = phase
        assert title == "inner"
        assert 0 <= seconds < 60
    assert current_phase() is None


def test_heartbeats_name_the_phase_while_no_step_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "SECONDS", 0.01)
    log = RunLog(RunFolder(tmp_path), first_step=0, total_steps=9, epochs=1)
    log.step({"step": 1, **RECORD})
    file = RunFolder(tmp_path).metrics
    with Phase("reading", visible=False):
        deadline = time.monotonic() + 30
        while len(named := [beat for beat in read_records(file) if beat.get("phase") == "reading"]) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    log.close()
    assert {(beat["step"], beat["last_step"]) for beat in named} == {(1, 9)}
    assert named[0]["phase_seconds"] <= named[-1]["phase_seconds"]
    assert abs(named[-1]["time"] - time.time()) < 60
    *_, last = read_records(file)
    assert last["phase"] == heartbeat.ENDED
    # An import of torch alone takes more than 50 MiB; ru_maxrss may include a process that has started this one.
    assert 50 < last["peak_mib"] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 + 1


def status(run: Path) -> RunStatus:
    return read_status(RunFolder(run))


def test_status_tells_a_running_run_from_one_that_has_ended_or_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(RunFolder(tmp_path), first_step=0, total_steps=3, epochs=1)
    log.event({"step": 0, "epoch": 0, "skipped_images": 4})
    log.step({"step": 1, **RECORD})
    log.step({"step": 2, **RECORD})
    running = status(tmp_path)
    assert (running.state, running.step, running.last_step) == ("running", 2, 3)
    assert (running.step_ms, running.images_per_second, running.loss) == (250, 256, 1.5)
    assert (running.skipped_images, running.checkpoint_age) == (4, None)
    with monkeypatch.context() as patch:
        patch.setattr(run_status, "_SILENT_SECONDS", -60)
        assert status(tmp_path).state == "silent"
        assert main(["--run", str(tmp_path)]) == 1
        assert "it was probably killed, rerun the same command to resume" in capsys.readouterr().out
    log.close()
    assert status(tmp_path).state == "stopped"

    log = RunLog(RunFolder(tmp_path), first_step=2, total_steps=3, epochs=1)
    log.step({"step": 3, **RECORD})
    log.close()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").touch()
    capsys.readouterr()
    assert main(["--run", str(tmp_path), "--json"]) == 0
    finished = json.loads(capsys.readouterr().out)
    assert (finished["state"], finished["step"]) == ("finished", 3)
    assert finished["checkpoint_age"] < 60


def test_status_of_another_folder_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(tmp_path)]) == 2
    assert "metrics.jsonl cannot be read (No such file or directory); expected" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 4}\n{"st')
    assert main(["--run", str(tmp_path)]) == 2
    assert "has no heartbeat" in capsys.readouterr().err
