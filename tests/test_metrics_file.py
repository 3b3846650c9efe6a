"""metrics.jsonl: what is read from a damaged file, what a resumed run keeps of it, and writing on a full disk."""

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from fastsimclr.metrics_file import MetricsFile, read_records
from fastsimclr.run_folder import RunFolder


def step(number: int) -> dict[str, Any]:
    return {"step": number, "epoch": 0, "loss": 1.0, "stages_ms": {"forward": 1.0}}


def knn(number: int) -> dict[str, Any]:
    return {"step": number, "epoch": 0, "knn_accuracy": 0.5}


def line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


DAMAGED = [
    b"\0" * 4096 + line(step(2)),  # zeros after a power cut, and a line that was written after them
    b"\xff\xfe{}\n",
    b'{"step": 2, "lo\n',
    b"[" * 100_000 + b"\n",
    b"2\n",
    b'{"loss": 1.0}\n',
    b'{"step": "2", "loss": 1.0}\n',
    b'{"step": 2, "loss": "1.0"}\n',
    b'{"step": 2, "loss": 1.0, "stages_ms": [1]}\n',
    b'{"step": 2, "knn_accuracy": 0.5}\n',
    b"\n",
]


def test_damaged_lines_are_moved_to_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path)
    good = [knn(0), step(1), step(3), step(4)]
    torn = line(step(5))[:-1]  # complete but for its end, which the next line would follow
    run.metrics.write_bytes(b"".join([*map(line, good[:2]), *DAMAGED, *map(line, good[2:]), torn]))
    assert list(read_records(run.metrics)) == good
    MetricsFile(run, step=4, is_epoch_finished=True).close()
    assert run.metrics.read_bytes() == b"".join(map(line, good))
    assert run.damaged_metrics.read_bytes() == b"".join([*DAMAGED, torn, b"\n"])
    assert f"{len(DAMAGED) + 1} damaged lines" in capsys.readouterr().err
    MetricsFile(run, step=4, is_epoch_finished=True).close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("steps", "is_epoch_finished", "kept"),
    [(0, True, 0), (1, True, 2), (2, True, 4), (2, False, 3), (9, True, 6)],
)
def test_what_a_resumed_run_repeats_is_dropped(tmp_path: Path, steps: int, is_epoch_finished: bool, kept: int) -> None:
    run, records = RunFolder(tmp_path), [knn(0), step(1), step(2), knn(2), step(3), step(4)]
    run.metrics.write_bytes(b"".join(map(line, records)))
    file = MetricsFile(run, step=steps, is_epoch_finished=is_epoch_finished)
    file.write(step(steps + 1))
    file.close()
    assert list(read_records(run.metrics)) == [*records[:kept], step(steps + 1)]


def test_lines_that_do_not_fit_are_written_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = RunFolder(tmp_path / "run")
    file = MetricsFile(run, step=0, is_epoch_finished=True)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # one line and a part of the next
        for number in range(1, 5):
            file.write(step(number))
        assert os.path.getsize(run.metrics) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert capsys.readouterr().err.count("cannot be written (File too large)") == 1
    file.write(step(5))
    file.sync()
    file.close()
    assert list(read_records(run.metrics)) == [step(number) for number in range(1, 6)]
    assert capsys.readouterr().err == ""
