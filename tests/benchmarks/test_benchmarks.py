"""The benchmark suite, and python -m benchmarks.report on its JSON files."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.benchmark_json import Role, read_results
from benchmarks.report import BEGIN, DISADVANTAGES, END, main
from benchmarks.suite import MIN_ROUNDS, Budget, Check, Spread, Suite

ROOT = Path(__file__).resolve().parents[2]
Ratio = tuple[float, float, float]  # lower quartile, median, upper quartile
STEADY: Ratio = (2.95, 3.0, 3.05)


def spread(lower: float, median: float, upper: float) -> dict[str, float]:
    return {"median": median, "lower": lower, "upper": upper}


def benchmark_page(
    others: Mapping[str, Ratio], *, group: str = "loss", views: int = 512, device: str = "cpu", **more: Any
) -> dict[str, Any]:
    """A benchmark as in the JSON files; the first contender takes 10 ms. more: fields of extra_info."""
    times = {"ours": spread(10, 10, 10)}
    times |= {name: spread(*(10 * each for each in ratio)) for name, ratio in others.items()}
    info: dict[str, Any] = {"rounds": 20, "milliseconds": times, "device": device, "sizes": {"views": views}}
    info["speedup"] = {name: spread(*ratio) for name, ratio in others.items()}
    return {"group": group, "name": f"test_{group}[{views}]", "extra_info": info | more}


def write_json(path: Path, *benchmarks: dict[str, Any], commit: str = "c0ffee1" + 33 * "0") -> Path:
    machine = {"cpu": "A CPU", "cores": 4, "torch_threads": 2, "gpu": None, "python": "3.11.7"}
    page = {
        "machine_info": machine | {"packages": {"torch": "2.15.0", "lightly": "not installed"}},
        "commit_info": {"id": commit, "dirty": False},
        "datetime": "2026-11-25T04:31:57+00:00",
        "benchmarks": list(benchmarks),
    }
    path.write_text(json.dumps(page))
    return path


def report(tmp_path: Path, *files: Path) -> str:
    assert main([*map(str, files), "--output", str(tmp_path / "out")]) == 0
    return (tmp_path / "out" / "report.md").read_text()


def row(text: str, contender: str) -> list[str]:
    """Return the cells of the contender's row, of which there must be one."""
    (line,) = [line for line in text.splitlines() if line.startswith("| ") and f"| {contender} |" in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_report_reads_what_the_suite_records(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    suite = Suite(benchmark)
    contenders = {"ours": lambda: sum(range(10)), "theirs": lambda: sum(range(10_000))}
    suite.interleave(contenders, sizes={"views": 8}, rounds=5)
    check = Check("relative error of the sum", 1e-7, 1e-3)
    suite.record(device="cpu", peak_mib={"ours": 2.5}, checks={"theirs": check})
    page = {"group": None, "name": "test_sum", "extra_info": json.loads(json.dumps(benchmark.extra_info))}
    (result,), left_out = read_results([write_json(tmp_path / "one.json", page)])
    assert not left_out
    assert (result.group, result.size, result.rounds, result.first.peak_mib) == ("test_sum", "views 8", 5, 2.5)
    (theirs,) = result.alternatives
    assert theirs.check == check
    assert theirs.ratio == Spread(**benchmark.extra_info["speedup"]["theirs"])
    assert theirs.ratio.median > 1


def test_contenders_must_be_checked_or_inexact(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    suite = Suite(benchmark)
    suite.interleave(dict.fromkeys(("ours", "theirs", "rough", "product"), lambda: 1), sizes={}, rounds=2)
    record: dict[str, Any] = {"device": "cpu", "references": ["product"], "notes": {"rough": "0.01 off"}}
    with pytest.raises(AssertionError, match="neither checked nor listed as inexact: rough, theirs"):
        suite.record(**record)
    record |= {"checks": {"theirs": Check("sum", 0.0, 1e-3)}, "inexact": ["rough"]}
    with pytest.raises(AssertionError, match="inexact contenders without a note on their error: rough"):
        suite.record(**record | {"notes": {}})
    suite.record(**record)
    page = {"group": None, "name": "test_sum", "extra_info": json.loads(json.dumps(benchmark.extra_info))}
    text = report(tmp_path, write_json(tmp_path / "one.json", page))
    checks = {name: row(text, name)[-1] for name in ("**ours**", "theirs", "rough", "product")}
    assert checks == {
        "**ours**": "the others are compared with it",
        "theirs": "sum: 0 ≤ 0.001",
        "rough": "**inexact**, see below",
        "product": "different work",
    }
    assert "- rough: 0.01 off" in text


# Rounds and time budget


def wait(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


@pytest.mark.parametrize(
    ("test_seconds", "min_rounds", "max_rounds"),
    [(100.0, 8, 8), (0.1, MIN_ROUNDS, 5), (0.001, MIN_ROUNDS, MIN_ROUNDS)],  # a round takes 0.012 s
)
def test_rounds_adapt_to_the_remaining_time(
    benchmark: BenchmarkFixture, test_seconds: float, min_rounds: int, max_rounds: int
) -> None:
    suite = Suite(benchmark, budget=Budget(100.0))
    suite.test_seconds = test_seconds
    timing = suite.interleave({"ours": wait(0.002), "theirs": wait(0.004)}, sizes={}, rounds=8)
    assert min_rounds <= timing.rounds <= max_rounds
    assert benchmark.extra_info["rounds"] == timing.rounds


def test_remaining_tests_share_the_budget(benchmark: BenchmarkFixture) -> None:
    assert Suite(benchmark, budget=Budget(100.0), tests=4).test_seconds == pytest.approx(25, abs=1)
    benchmark(lambda: None)


def test_is_skipped_without_time_for_the_minimum_of_rounds(benchmark: BenchmarkFixture) -> None:
    lines: list[str] = []
    suite = Suite(benchmark, "sums", Budget(0.5), write_line=lines.append)
    calls: list[str] = []
    slow = {name: lambda name=name: (calls.append(name), time.sleep(0.1)) for name in ("ours", "theirs")}
    reason = r"3 rounds take about 1 s, but only 0 s of BENCH_SECONDS=0\.5 are left"
    with pytest.raises(pytest.skip.Exception, match=reason):
        suite.interleave(slow, sizes={"views": 8})
    assert calls == ["ours"], "one slow call must be enough to skip the test"
    assert lines[0].startswith("sums | views 8 | ours | ")
    assert lines[-1].startswith("sums: skipped: 3 rounds take")
    benchmark(lambda: None)


def test_progress_lines(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suite.PROGRESS_SECONDS", 0.0)
    lines: list[str] = []
    suite = Suite(benchmark, "sums", write_line=lines.append)
    suite.interleave({"ours": wait(0.001), "theirs": wait(0.002)}, sizes={"views": 8}, rounds=4)
    shown = [line.split(" | ")[2] for line in lines]
    assert shown[:2] == ["ours", "theirs"]
    assert shown[-8:] == ["theirs", "ours"] * 4
    assert all(re.search(r"\| [\d.]+ ms \| relative time [\d.]+$", line) for line in lines)


SUITE = """
import time
from benchmarks.suite import Check, Suite

def test_first(suite: Suite) -> None:
    suite.interleave({"ours": lambda: time.sleep(0.01), "theirs": lambda: time.sleep(0.03)}, sizes={"views": 8})
    suite.record(checks={"theirs": Check("sum", 0.0, 1.0)}, missing={"gone": "not installed"})
    time.sleep(1.0)

def test_second(suite: Suite) -> None:
    raise AssertionError("the budget is used up")
"""


@pytest.mark.slow
def test_progress_and_budget_in_a_pytest_run(tmp_path: Path) -> None:
    """Run in a separate pytest process, which captures the output."""
    shutil.copy(ROOT / "benchmarks" / "conftest.py", tmp_path)
    (tmp_path / "bench_sums.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", str(tmp_path)],
        env={**os.environ, "BENCH_SECONDS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        r"bench_sums test_first \| views 8 \| ours \| [\d.]+ ms \| relative time 1",
        r"bench_sums test_first \| views 8 \| theirs \| [\d.]+ ms \| relative time [\d.]+",
        r"bench_sums test_first: views 8; .+; \d+ rounds, median \(quartiles\)",
        r"  gone +not measured: not installed",
    ):
        assert re.search(f"^{line}$", done.stdout, re.MULTILINE), line
    assert "bench_sums.py::test_second: skipped: BENCH_SECONDS=1 are used up" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout


def test_check_rejects_errors_above_the_bound() -> None:
    with pytest.raises(AssertionError, match=r"different function: loss is 0.01, above 0.001"):
        Check("loss", 1e-2, 1e-3)
    with pytest.raises(AssertionError, match="different function"):
        Check("loss", float("nan"), 1e-3)


# Tables


def test_row_of_the_report(tmp_path: Path) -> None:
    more = {"peak_mib": {"ours": 12, "dense": 840}, "notes": {"dense": "plain PyTorch"}}
    more |= {"checks": {"dense": {"what": "relative error", "error": 2e-7, "bound": 1e-3}}, "missing": {"x": "no GPU"}}
    text = report(tmp_path, write_json(tmp_path / "cpu.json", benchmark_page({"dense": (2.8, 3.0, 3.2)}, **more)))
    assert row(text, "**ours**")[2:6] == ["1", "", "10.0 (10.0 to 10.0)", "12.0"]
    ratio, spread_of_it, time, peak, check = row(text, "dense")[2:]
    assert (ratio, spread_of_it, time) == ("3.00 (2.80 to 3.20)", "13%", "30.0 (28.0 to 32.0)")
    assert (peak, check) == ("840", "relative error: 2e-07 ≤ 0.001")
    assert "### views 512" in text
    assert "20 rounds on CPU [[1]](#setups) (cpu.json)" in text
    assert "- dense: plain PyTorch" in text
    assert "- not measured: x: no GPU" in text
    assert "1. A CPU; 4 cores, 2 threads; Python 3.11.7, torch 2.15.0; commit c0ffee1; 2026-11-25\n" in text
    assert "No alternative is faster" in text


def test_wide_spreads_are_marked(tmp_path: Path) -> None:
    file = write_json(tmp_path / "a.json", benchmark_page({"steady": STEADY, "shaky": (0.9, 1.0, 1.24)}))
    text = report(tmp_path, file)
    assert row(text, "shaky")[3] == "**⚠ 34%**"
    assert row(text, "steady")[3] == "3%"


def test_ratios_are_per_image(tmp_path: Path) -> None:
    # A call takes three times as long, for a quarter of the images.
    file = write_json(tmp_path / "a.json", benchmark_page({"theirs": STEADY}, images={"ours": 256, "theirs": 64}))
    text = report(tmp_path, file)
    assert row(text, "theirs")[2] == "12.0 (11.8 to 12.2)"
    assert row(text, "theirs")[5] == "2,133"  # 64 in 30 ms
    assert row(text, "**ours**")[5] == "25,600"


def test_faster_alternatives_are_listed(tmp_path: Path) -> None:
    others = {"faster": (0.7, 0.8, 0.9), "about as fast": (0.9, 0.99, 1.1), "slower": STEADY}
    # Variants, experiments and references are not alternatives.
    others |= {"ours, bf16": (0.4, 0.5, 0.6), "product": (0.1, 0.1, 0.1), "experiment": (0.6, 0.6, 0.6)}
    roles = {"variants": ["ours, bf16"], "experiments": ["experiment"], "references": ["product"]}
    file = write_json(tmp_path / "a.json", benchmark_page(others, **roles))
    (result,), _ = read_results([file])
    assert [each.name for each in result.contenders] == [
        "ours",
        "product",
        "ours, bf16",
        "experiment",
        "faster",
        "about as fast",
        "slower",
    ]
    assert [each.role for each in result.contenders[:4]] == [Role.FIRST, Role.REFERENCE, Role.VARIANT, Role.EXPERIMENT]
    text = report(tmp_path, file)
    assert "- experiment: experiment, in benchmarks/ only\n" in text
    lines = [line for line in text.partition(f"## {DISADVANTAGES}")[2].partition("##")[0].splitlines() if line]
    assert [line.split("**")[1] for line in lines] == ["faster", "about as fast"]
    assert "0.800 (0.700 to 0.900) times as long as fastsimclr" in lines[0]
    assert [line.endswith("within the noise") for line in lines] == [False, True]
    assert row(text, "faster")[2].startswith("0.800")


def test_alternatives_with_less_memory_are_listed(tmp_path: Path) -> None:
    peaks = {"ours": 12.0, "smaller": 8.0, "larger": 16.0, "unknown": None}
    file = write_json(
        tmp_path / "a.json", benchmark_page(dict.fromkeys(["smaller", "larger", "unknown"], STEADY), peak_mib=peaks)
    )
    lines = report(tmp_path, file).partition(f"## {DISADVANTAGES}")[2].partition("##")[0]
    assert [line.partition("**")[2] for line in lines.splitlines() if line] == [
        "smaller** peaks at 8.00 MiB, fastsimclr 12.0 MiB"
    ]


def test_devices_and_commits_share_the_table_of_a_benchmark(tmp_path: Path) -> None:
    cpu = write_json(tmp_path / "cpu.json", benchmark_page({"dense": STEADY}))
    later = write_json(tmp_path / "later.json", benchmark_page({"dense": STEADY}), commit="decade2" + 33 * "0")
    gpu = write_json(tmp_path / "gpu.json", benchmark_page({"dense": STEADY}, device="NVIDIA H200"))
    text = report(tmp_path, cpu, later, gpu)
    assert text.count("### views 512") == 1
    rows = [line.split(" | ") for line in text.splitlines() if " | dense | " in line]
    assert [cells[0].split("]")[0] for cells in rows] == ["| CPU [[1", "| CPU [[2", "| H200 [[3"]
    assert "commit decade2" in text
    assert "3. NVIDIA H200, on A CPU;" in text


def test_each_group_has_a_chart(tmp_path: Path) -> None:
    # In the last one, the bar is clipped and no memory is recorded.
    benchmarks = [
        benchmark_page({"dense": STEADY}, group="NT-Xent forward", peak_mib={"ours": 1.0, "dense": 30.0}),
        benchmark_page({"dense": STEADY, "none": (0.5, 0.6, 0.7)}, group="NT-Xent forward", views=4096),
        benchmark_page({"loop": (400, 500, 600)}, group="LARS"),
    ]
    text = report(tmp_path, write_json(tmp_path / "a.json", *benchmarks))
    for name in ("nt-xent-forward.png", "lars.png"):
        assert f"]({name})" in text
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_benchmarks_without_contenders_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = {"group": None, "name": "test_memory", "extra_info": {"mib": 3}}
    files = [
        write_json(tmp_path / "new.json", benchmark_page({"d": STEADY})),
        write_json(tmp_path / "alone.json", alone),
    ]
    text = report(tmp_path, *files)
    line = "alone.json: left out 1 benchmark without contenders"
    assert line in text
    assert line in capsys.readouterr().out


# User errors


def user_errors(folder: Path) -> dict[str, list[Path | str]]:
    good = write_json(folder / "good.json", benchmark_page({"dense": STEADY}))
    alone = write_json(folder / "alone.json", {"group": None, "name": "test_memory", "extra_info": {}})
    (folder / "list.json").write_text("[]")
    (folder / "text.json").write_text("no JSON")
    (folder / "plain.md").write_text("# No markers\n")
    return {
        "missing.json: No such file": [folder / "missing.json", "--output", folder / "out"],
        "list.json: expected a file written by `pytest benchmarks": [folder / "list.json", "--output", folder / "out"],
        "text.json: not a JSON file": [folder / "text.json", "--output", folder / "out"],
        "alone.json: left out 1 benchmark": [alone, "--output", folder / "out"],
        "got neither --output nor --readme": [good],
        "got --check without --readme": [good, "--output", folder, "--check"],
        "plain.md: expected the lines <!--": [good, "--readme", folder / "plain.md"],
        "none.md: No such file": [good, "--readme", folder / "none.md"],
    }


def test_user_errors_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for message, arguments in user_errors(tmp_path).items():
        with pytest.raises(SystemExit) as stopped:
            main([str(each) for each in arguments])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


# README


def test_readme_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The best alternative is neither a variant, nor an experiment, nor a reference.
    roles = {"references": ["product"], "variants": ["bf16"], "experiments": ["experiment"]}
    others = {"lightly": (6.0, 8.0, 10.0), "product": STEADY, "dense": (0.9, 0.95, 0.97), "bf16": (0.5, 0.5, 0.5)}
    others |= {"experiment": (0.2, 0.2, 0.2)}
    file = write_json(
        tmp_path / "a.json",
        benchmark_page(
            {"loop": (2.0, 3.0, 4.0)}, images={"ours": 64, "loop": 64}, inexact=["loop"], readme_task="views"
        ),
        benchmark_page({"dense": STEADY}, views=64),
        benchmark_page(others, readme_task="NT-Xent, 512 views", **roles),
        benchmark_page({"dense": STEADY}, device="NVIDIA H200", readme_task="NT-Xent, 512 views"),
    )
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nolder figures\n{END}\nafter\n")
    command = [str(file), "--readme", str(readme)]
    assert main([*command, "--check"]) == 1
    assert "older figures" in readme.read_text()
    assert main(command) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\nDevice: A CPU; 4 cores, 2 threads; torch 2.15.0.\n")
    assert "\nDevice: NVIDIA H200, on A CPU; 4 cores, 2 threads; torch 2.15.0.\n" in text
    assert text.endswith(f"\n{END}\nafter\n")
    assert [line for line in text.splitlines() if line.startswith("| ") and "---" not in line] == [
        "| task | fastsimclr | best alternative | times faster |",
        "| NT-Xent, 512 views | 10.0 ms | dense: 9.50 ms | 0.950 |",
        "| views | 6,400 images/s | loop †: 2,133 images/s | 3.00 ⚠ |",
        "| task | fastsimclr | best alternative | times faster |",
        "| NT-Xent, 512 views | 10.0 ms | dense: 30.0 ms | 3.00 |",
    ]
    for explanation in ("Below 1, the alternative is faster.", "† Inexact:", "⚠ Noisy:"):
        assert explanation in text
    anchor = "where-an-alternative-is-faster-or-smaller"
    assert f"(benchmarks/results/report.md#{anchor})" in text
    capsys.readouterr()
    assert main([*command, "--check"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_readme_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--readme", str(ROOT / "README.md"), "--check"]) == 0, capsys.readouterr().out
