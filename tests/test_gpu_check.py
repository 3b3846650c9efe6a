"""scripts/gpu_check.sh on a machine without a GPU: its dry run, its runner and the programs that it starts."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import nt_xent_accuracy
from fastsimclr._extension import why_unavailable

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.fixture(scope="module")
def check() -> Iterator[ModuleType]:
    """The module gpu_check, with scripts/ in sys.path for its imports."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("gpu_check")
    sys.path.remove(str(ROOT / "scripts"))


def gpu_check(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", root / "scripts" / "gpu_check.sh", *arguments],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


# Dry run


def test_dry_run_passes() -> None:
    done = gpu_check("--dry-run")
    assert done.returncode == 0, done.stdout
    assert "FAILED" not in done.stdout
    for name in ("tests/data/test_crop.py", "benchmarks/bench_train.py", "small_kernels"):
        assert re.search(rf"^ok: .*{name}", done.stdout, re.MULTILINE), name


def test_dry_run_finds_a_missing_import_and_a_missing_gpu_test(tmp_path: Path) -> None:
    for name in ("scripts", "tests", "benchmarks", "fastsimclr"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    test_file, conftest = tmp_path / "tests" / "loss" / "test_fused.py", tmp_path / "tests" / "conftest.py"
    test_file.write_text(test_file.read_text().replace("import torch\n", "import jsonargparse\nimport torch\n", 1))
    gpu_param = 'pytest.param("gpu", marks=pytest.mark.gpu)'
    assert gpu_param in conftest.read_text()
    conftest.write_text(conftest.read_text().replace(gpu_param, '"gpu"'))
    done = gpu_check("--dry-run", "tests", root=tmp_path)
    assert done.returncode == 1
    assert "No module named 'jsonargparse'" in done.stdout
    assert "no test of tests/data/test_crop.py was collected" in done.stdout


def test_every_gpu_test_belongs_to_a_stage(check: ModuleType) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", "-m", "gpu", "tests"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    marked = set(re.findall(r"^(tests/[\w/]+\.py)::", output, re.MULTILINE))
    assert "tests/data/test_crop.py" in marked, output
    assert marked == {
        file
        for stage in check.STAGES
        for file in (*stage.files, *stage.optional_files)
        if re.match(r"tests/[\w/]+\.py$", file)
    }


@without_gpu
def test_exits_with_2_without_a_gpu(tmp_path: Path) -> None:
    done = gpu_check(str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.endswith("no GPU is available: AssertionError: torch sees no GPU\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "expected a folder"), (("out", "no_stage"), "got the stages no_stage, expected some of build, doctor")],
)
def test_exits_with_2_for_wrong_arguments(arguments: tuple[str, ...], message: str) -> None:
    done = gpu_check(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


# Runner


def run(check: ModuleType, out: Path, *stages: Any, budget: float = 100.0) -> tuple[bool, list[dict[str, Any]]]:
    machine = {"commit": "c0ffee1", "device": "GPU", "driver": "580", "arch": "90"}
    ok = check.Runner(out, machine, budget).run(stages)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ok"] == ok
    return ok, summary["stages"]


def shell(check: ModuleType, name: str, command: str, seconds: int = 20, **more: Any) -> Any:
    return check.Stage(name, seconds, ("bash", "-c", command), **more)


def test_outcomes_of_stages(check: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    passed = importlib.import_module("gpu_stages").passed
    stages = {
        "ok": shell(check, "a", "echo 3 passed; echo t.py s.s", proofs=passed("t.py")),
        "failed (3)": shell(check, "b", "exit 3", refusal="not allowed"),
        r"failed: nothing in its output matches ^t\.py .*\.": shell(check, "c", "echo 3 passed", proofs=passed("t.py")),
        "not done here: the machine does not allow it": shell(check, "d", "echo not allowed; exit 1", refusal="not al"),
        "not done here: no_such_module is not installed": shell(check, "e", "exit 1", modules=("no_such_module",)),
        "not done here: no-program is not in PATH": shell(check, "f", "exit 1", programs=("no-program",)),
        "not done here: NO_FOLDER names no folder": shell(check, "g", "exit 1", folders=("NO_FOLDER",)),
        "cut off after 1 s": shell(check, "h", "echo begun; sleep 30", seconds=1),
    }
    ok, done = run(check, tmp_path, *stages.values())
    assert not ok
    assert [stage["outcome"] for stage in done] == list(stages)
    assert [stage["name"] for stage in done if stage["failed"]] == ["b", "c", "h"]
    assert capfd.readouterr().out == (tmp_path / "log.txt").read_text()
    assert "begun\n" in (tmp_path / "log.txt").read_text()


def test_fatal_stage_stops_the_run(check: ModuleType, tmp_path: Path) -> None:
    ok, done = run(check, tmp_path, shell(check, "build", "exit 1", fatal=True), shell(check, "tests", "true"))
    assert not ok
    assert [stage["name"] for stage in done] == ["build"]


def test_summary_is_written_before_the_next_stage(check: ModuleType, tmp_path: Path) -> None:
    ok, _ = run(
        check, tmp_path, shell(check, "a", "true"), shell(check, "b", 'grep -q \'"name": "a"\' {out}/summary.json')
    )
    assert ok


def test_stages_cut_off_by_the_budget_are_not_failures(check: ModuleType, tmp_path: Path) -> None:
    started = time.monotonic()
    stages = [shell(check, "a", "sleep 60", seconds=60), shell(check, "b", "true", seconds=60)]
    ok, done = run(check, tmp_path, *stages, budget=12)
    assert ok
    assert [stage["outcome"] for stage in done] == ["cut off after 11 s", "not started: no time left"]
    assert time.monotonic() - started < 30


def test_files_with_missing_modules_are_left_out(check: ModuleType, tmp_path: Path) -> None:
    files = {"one": ("json",), "two": ("nowhere.module",)}
    _, (done,) = run(check, tmp_path, check.Stage("a", 20, ("echo",), ("always",), files))
    assert done["command"] == "echo always one"
    assert "left out: two needs nowhere.module, not installed" in (tmp_path / "log.txt").read_text()


def test_verdicts_are_repeated_at_the_end(check: ModuleType, tmp_path: Path) -> None:
    run(check, tmp_path, shell(check, "a", "echo 'target, ms at most 0.155: MISSED (0.2)'; echo they met nobody"))
    assert json.loads((tmp_path / "summary.json").read_text())["verdicts"] == [
        "a: target, ms at most 0.155: MISSED (0.2)"
    ]


# Programs that it starts


@pytest.mark.skipif(bool(why_unavailable(torch.device("cpu"))), reason=why_unavailable(torch.device("cpu")) or "-")
def test_small_kernels_pass_in_emulation() -> None:
    command = [sys.executable, ROOT / "scripts" / "small_kernels.py", "--emulated"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("at most") == 20  # errors of 6 losses (and their dz), 2 crops (2 figures each), 4 colors


def test_small_kernels_report_wrong_results(check: ModuleType) -> None:
    small_kernels = importlib.import_module("small_kernels")
    for error in (0.2, float("nan")):
        with pytest.raises(SystemExit, match="differs from the CPU's"):
            small_kernels.report("loss", [0.0, error], (0.1, 0.1))


def test_accuracy_and_its_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "accuracy.json"
    assert nt_xent_accuracy.main(["--num_views=512", "--width=32", "--backend=tiled", f"--json={file}"]) == 0
    highest, medium = json.loads(file.read_text())["rows"]
    assert highest["verdict"] == "at most 1e-05: met"
    assert medium["verdict"] == "recorded"
    assert "512 x 32, highest: losses " in capsys.readouterr().out
    for error in (1e-4, float("nan")):
        assert nt_xent_accuracy.verdict({**highest, "dz_relative_error": error}) == "at most 1e-05: MISSED"


def test_features_share_a_mean() -> None:
    z1, z2 = nt_xent_accuracy.features(256, 128, torch.device("cpu"))
    unit = torch.nn.functional.normalize(torch.cat([z1, z2]).double(), dim=1)
    unrelated = (unit @ unit.T)[:100, 128:].triu(1)
    assert unrelated[unrelated != 0].mean() > 0.9
