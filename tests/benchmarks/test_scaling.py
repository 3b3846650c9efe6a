"""python -m benchmarks.scaling: predictions beside measured ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import summarize

ROOT = Path(__file__).resolve().parents[2]


def test_summary_has_the_medians_of_the_rounds() -> None:
    def run(ranks: int, predicted: float, measured: float) -> dict[str, object]:
        times = {"predicted_ms": predicted, "measured_ms": measured, "predicted_mib": 1, "measured_mib": 2}
        return {"mode": "weak", "ranks": ranks, **times}

    rounds = [{"runs": [run(1, 9.0, 9.0), run(2, *times)]} for times in ((10.0, 8.0), (30.0, 40.0), (11.0, 10.0))]
    found = summarize(rounds, "weak", 2)
    assert (found["predicted_ms"], found["measured_ms"]) == (11.0, 10.0)
    assert found["errors"] == [0.25, -0.25, 0.1]
    assert found["error"] == 0.1


@pytest.mark.slow
def test_two_ranks_are_compared_with_their_prediction(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    options = ["--rounds=1", "--tries=1", "--steps=16", "--ranks", "1", "2", "--modes", "strong", f"--json={file}"]
    subprocess.run([sys.executable, "-m", "benchmarks.scaling", *options], cwd=ROOT, check=True, timeout=500)
    record = json.loads(file.read_text())
    (round_,) = record["rounds"]
    assert round_["bandwidth"] > 0.01
    assert 0 < round_["latency_us"] < 1e6
    one, two = round_["runs"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["predicted_parts_ms"]["encoder"] < one["predicted_parts_ms"]["encoder"]
    assert {"forward", "gather", "rank_wait"} <= two["measured_stages_ms"].keys()
    assert [row["ranks"] for row in record["summary"]] == [1, 2]
