"""Progress without a terminal, which prints lines."""

import re
import time
from pathlib import Path

import pytest

from fastsimclr import progress_bar as module
from fastsimclr.progress_bar import Phase, PlainProgress, progress_bar
from fastsimclr.run_folder import RunFolder
from fastsimclr.training.metrics import RunLog


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_first_line_comes_after_five_seconds_then_one_every_thirty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    bar = progress_bar(3000, "embedding", "image")
    assert isinstance(bar, PlainProgress)
    for second in range(1, 51):
        clock.now = float(second)
        bar.set_postfix_str("epoch 1")
        bar.update(10)
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "embedding: 50 of 3,000 images, epoch 1, 4 min 55 s left",
        "embedding: 350 of 3,000 images, epoch 1, 4 min 25 s left",
    ]


def test_other_ranks_print_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    bar = progress_bar(10, "embedding", "image", visible=False)
    clock.now = 100.0
    bar.update(5)
    bar.close()
    assert capsys.readouterr().err == ""


def test_time_left_is_that_of_the_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    log = RunLog(RunFolder(tmp_path), first_step=0, total_steps=100, epochs=10)
    record = {"epoch": 0, "loss": 1.0, "lr": 0.1, "step_ms": 500.0, "images": 64}
    log.step(record | {"step": 1})
    clock.now = 600.0  # kNN took ten minutes
    log.step(record | {"step": 2})
    log.close()
    assert capsys.readouterr().err == "epoch 1/10, step 2/100: loss 1.0000, lr 0.1, 128 images/s, 49 s left\n"


def test_slow_step_is_shown_until_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "FIRST_LINE_SECONDS", 0.05)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    log = RunLog(RunFolder(tmp_path), first_step=0, total_steps=100, epochs=10)
    log.show_first_step(90.0)
    assert "first step (about 1 min 30 s): " in wait_for(" s\n", capsys)
    monkeypatch.setattr(module, "LINE_SECONDS", 0.05)
    log.step({"step": 1, "epoch": 0, "loss": 1.0, "lr": 0.1, "step_ms": 500.0, "images": 64})
    assert "step 2/100: " in wait_for("step 2/100: ", capsys)
    log.close()
    capsys.readouterr()
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_only_the_innermost_phase_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    with Phase("opening the images"):
        assert re.fullmatch(r"opening the images: [\d.]+ s\n", wait_for("\n", capsys))
        with Phase("waiting for the other ranks"), Phase("on another rank", visible=False):
            assert re.fullmatch(r"waiting for the other ranks: [\d.]+ s\n", wait_for("\n", capsys))
            time.sleep(0.1)
    assert capsys.readouterr().err == ""


def wait_for(text: str, capsys: pytest.CaptureFixture[str]) -> str:
    shown, deadline = "", time.monotonic() + 30
    while text not in shown and time.monotonic() < deadline:
        time.sleep(0.01)
        shown += capsys.readouterr().err
    return shown
