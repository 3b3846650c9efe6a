"""docs/tutorial.md does what it says, run block by block as a reader would."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TUTORIAL = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"


def test_the_tutorial_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```(python|sh)\n(.*?)```", TUTORIAL.read_text(), flags=re.DOTALL)
    for language, code in blocks:
        if language == "python":
            exec(code, names)
        for line in code.splitlines() if language == "sh" else []:
            command = line.replace("python", sys.executable, 1).split()
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert len(blocks) >= 8
    run = tmp_path / "runs" / "digits"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    knn = [line["knn_accuracy"] for line in lines if "knn_accuracy" in line]
    assert knn[0] == pytest.approx(0.35, abs=0.1), "as the tutorial says"
    assert knn[-1] == pytest.approx(0.93, abs=0.05), "as the tutorial says"
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < math.log(255) < losses[0], "as the tutorial says"
    found = {file.stem for file in (run / "evaluate").glob("*.json")}
    assert found == {"knn", "linear-lbfgs", "finetune-0.1"}
    assert {file.name for file in (run / "embed").iterdir()} >= {"features.npy", "images.csv", "map.png", "gallery.png"}
    assert (run / "report.html").stat().st_size > 100_000
