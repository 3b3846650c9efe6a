"""Runs that are killed again and again at random moments, and resumed, end like a run that was not."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.runs import LONG, TINY, Process, count_steps, fork
from weights import metrics, steps

from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.metrics_file import read_records
from fastsimclr.run_folder import RunFolder

EPOCHS, EPOCH_STEPS = 24 if LONG else 6, 45
STEPS = EPOCHS * EPOCH_STEPS
# A checkpoint after every fifth step, and two kNN measurements.
OPTIONS = [*TINY, "--batch_size=32", f"--epochs={EPOCHS}"]
OPTIONS += ["--checkpoint_every=0.11", "--knn_every=3", "--knn_images=500"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_runs_end_like_one_that_was_not(
    tmp_path: Path, ranks: int, nothing_left: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for process in fork(*OPTIONS, f"--output={whole}", ranks=ranks):
        process.end()

    draw = random.Random(ranks)
    kills = {"start": 0, "step": 0, "checkpoint": 0, "kNN": 0}
    started, missed = time.monotonic(), 0
    while sum(kills.values()) < (25 if LONG else 4):
        moment = _moment(killed, draw, kills)
        processes = fork(*OPTIONS, f"--output={killed}", ranks=ranks)
        _wait(moment, processes, killed, draw)
        if processes[0].poll() is not None:  # it has finished
            break
        is_inside = _is_at(moment, killed)
        draw.shuffle(processes)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            assert process.wait() == -signal.SIGKILL
        kills[moment] += is_inside
        missed += not is_inside
        nothing_left()
    for process in fork(*OPTIONS, f"--output={killed}", ranks=ranks):
        process.end()
    nothing_left(killed)
    with capsys.disabled():
        print(f"\n{ranks} ranks, kills: {kills}, {missed} beside the meant moment; {time.monotonic() - started:.0f} s")

    assert sum(kills.values()) == (25 if LONG else 4)
    assert [record["step"] for record in steps(killed)] == list(range(1, STEPS + 1))
    bound = {"rtol": 0.0, "atol": 0.0 if ranks == 1 else 1e-6}
    for name in ("loss", "knn_accuracy"):
        curves = [[record[name] for record in metrics(run) if name in record] for run in (killed, whole)]
        torch.testing.assert_close(*map(torch.tensor, curves), **bound)
    states = [load_checkpoint(RunFolder(run).checkpoint) for run in (killed, whole)]
    torch.testing.assert_close(states[0]["model"], states[1]["model"], **bound)
    torch.testing.assert_close(states[0]["optimizer"], states[1]["optimizer"], **bound)


def _moment(run: Path, draw: random.Random, kills: dict[str, int]) -> str:
    """Choose where the next kill is meant to fall: the kind that has had the fewest of those that are left."""
    left = [moment for moment in kills if moment != "kNN" or count_steps(run) < STEPS - EPOCH_STEPS]
    draw.shuffle(left)
    return min(left, key=lambda moment: kills[moment])


def _wait(moment: str, processes: list[Process], run: Path, draw: random.Random) -> None:
    """Wait until the run is where it is to be killed, or has finished."""
    if moment == "start":
        time.sleep(draw.uniform(0, 1))
        return
    # New steps, so that the run gets on.
    first = count_steps(run) + 1 + draw.randrange(5)
    reached = False
    while processes[0].poll() is None and not (reached and _is_at(moment, run)):
        reached = reached or count_steps(run) >= first
        if not reached or moment == "kNN":
            time.sleep(0.002)
    if moment == "step":
        time.sleep(draw.uniform(0, 0.1))


def _is_at(moment: str, run: Path) -> bool:
    if moment == "checkpoint":
        return any((run / "checkpoints").glob("*.partial"))
    if moment == "kNN":  # after the last step of an epoch of which it is measured, and before its record
        records = list(read_records(RunFolder(run).metrics))  # the last line may be incomplete
        return "loss" in records[-1] and records[-1]["step"] % (3 * EPOCH_STEPS) == 0
    return True
