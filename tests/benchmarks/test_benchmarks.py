"""python -m benchmarks.report: what it makes of the JSON of `pytest benchmarks`."""

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

from benchmarks.measured import Kind, read
from benchmarks.report import BEGIN, END, main
from benchmarks.suite import MIN_ROUNDS, Budget, Check, Spread, Suite

ROOT = Path(__file__).resolve().parents[2]
Ratio = tuple[float, float, float]  # lower quartile, median, upper quartile
STEADY: Ratio = (2.95, 3.0, 3.05)


def spread(lower: float, median: float, upper: float) -> dict[str, float]:
    return {"median": median, "lower": lower, "upper": upper}


def measured(
    rivals: Mapping[str, Ratio], *, group: str = "loss", views: int = 512, device: str = "cpu", **more: Any
) -> dict[str, Any]:
    """A benchmark as its JSON has it: ours takes 10 ms. more: of extra_info."""
    times = {"ours": spread(10, 10, 10)}
    times |= {name: spread(*(10 * each for each in ratio)) for name, ratio in rivals.items()}
    info: dict[str, Any] = {"rounds": 20, "milliseconds": times, "device": device, "sizes": {"views": views}}
    info["speedup"] = {name: spread(*ratio) for name, ratio in rivals.items()}
    return {"group": group, "name": f"test_{group}[{views}]", "extra_info": info | more}


def results(path: Path, *benchmarks: dict[str, Any], commit: str = "c0ffee1" + 33 * "0") -> Path:
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
    assert main([*map(str, files), "--output", str(tmp_path / "made")]) == 0
    return (tmp_path / "made" / "report.md").read_text()


def row(text: str, contender: str) -> list[str]:
    """The cells of the one row of a contender, by its name."""
    (line,) = [line for line in text.splitlines() if line.startswith("| ") and f"| {contender} |" in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_report_reads_what_a_benchmark_leaves(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    suite = Suite(benchmark)
    contenders = {"ours": lambda: sum(range(10)), "theirs": lambda: sum(range(10_000))}
    suite.interleave(contenders, sizes={"views": 8}, rounds=5)
    check = Check("sum, relative", 1e-7, 1e-3)
    suite.record(device="cpu", peak_mib={"ours": 2.5}, checks={"theirs": check})
    page = {"group": None, "name": "test_sum", "extra_info": json.loads(json.dumps(benchmark.extra_info))}
    (found,), older = read([results(tmp_path / "one.json", page)])
    assert not older
    assert (found.group, found.size, found.rounds, found.first.peak_mib) == ("test_sum", "views 8", 5, 2.5)
    (theirs,) = found.rivals
    assert theirs.check == check
    assert theirs.ratio == Spread(**benchmark.extra_info["speedup"]["theirs"])
    assert theirs.ratio.median > 1


def test_whoever_is_compared_is_checked_or_said_to_differ(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    suite = Suite(benchmark)
    suite.interleave(dict.fromkeys(("ours", "theirs", "rough", "product"), lambda: 1), sizes={}, rounds=2)
    said: dict[str, Any] = {"device": "cpu", "yardsticks": ["product"], "notes": {"rough": "0.01 off"}}
    with pytest.raises(AssertionError, match="not checked, and not said to differ: rough, theirs"):
        suite.record(**said)
    said |= {"checks": {"theirs": Check("sum", 0.0, 1e-3)}, "differing": ["rough"]}
    with pytest.raises(AssertionError, match="how far off they are is not in the notes: rough"):
        suite.record(**said | {"notes": {}})
    suite.record(**said)
    page = {"group": None, "name": "test_sum", "extra_info": json.loads(json.dumps(benchmark.extra_info))}
    text = report(tmp_path, results(tmp_path / "one.json", page))
    checks = {name: row(text, name)[-1] for name in ("**ours**", "theirs", "rough", "product")}
    assert checks == {
        "**ours**": "the others are compared with it",
        "theirs": "sum: 0 ≤ 0.001",
        "rough": "**differs**, see below",
        "product": "other work",
    }
    assert "- rough: 0.01 off" in text


# The rounds and the time budget


def wait(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


@pytest.mark.parametrize(
    ("share", "least", "most"),
    [(100.0, 8, 8), (0.1, MIN_ROUNDS, 5), (0.001, MIN_ROUNDS, MIN_ROUNDS)],  # a round takes 0.012 s
)
def test_rounds_adapt_to_the_time_that_is_left(
    benchmark: BenchmarkFixture, share: float, least: int, most: int
) -> None:
    suite = Suite(benchmark, budget=Budget(100.0))
    suite.share = share
    timing = suite.interleave({"ours": wait(0.002), "theirs": wait(0.004)}, sizes={}, rounds=8)
    assert least <= timing.rounds <= most
    assert benchmark.extra_info["rounds"] == timing.rounds


def test_tests_share_what_is_left(benchmark: BenchmarkFixture) -> None:
    assert Suite(benchmark, budget=Budget(100.0), tests=4).share == pytest.approx(25, abs=1)
    benchmark(lambda: None)


def test_too_few_rounds_are_none(benchmark: BenchmarkFixture) -> None:
    lines: list[str] = []
    suite = Suite(benchmark, "sums", Budget(0.5), say=lines.append)
    calls: list[str] = []
    slow = {name: lambda name=name: (calls.append(name), time.sleep(0.1)) for name in ("ours", "theirs")}
    with pytest.raises(pytest.skip.Exception, match=r"3 rounds take about 1 s, and 0 s are left of BENCH_SECONDS=0\.5"):
        suite.interleave(slow, sizes={"views": 8})
    assert calls == ["ours"], "one slow call is enough to know"
    assert lines[0].startswith("sums | views 8 | ours | ")
    assert lines[-1].startswith("sums: skipped: 3 rounds take")
    benchmark(lambda: None)


def test_every_call_can_be_shown(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suite.SHOW_SECONDS", 0.0)
    lines: list[str] = []
    suite = Suite(benchmark, "sums", say=lines.append)
    suite.interleave({"ours": wait(0.001), "theirs": wait(0.002)}, sizes={"views": 8}, rounds=4)
    shown = [line.split(" | ")[2] for line in lines]
    assert shown[:2] == ["ours", "theirs"]
    assert shown[-8:] == ["theirs", "ours"] * 4
    assert all(re.search(r"\| [\d.]+ ms \| [\d.]+ x ours$", line) for line in lines)


SUITE = """
import time
from benchmarks.suite import Check, Suite

def test_first(suite: Suite) -> None:
    suite.interleave({"ours": lambda: time.sleep(0.01), "theirs": lambda: time.sleep(0.03)}, sizes={"views": 8})
    suite.record(checks={"theirs": Check("sum", 0.0, 1.0)}, missing={"gone": "not installed"})
    time.sleep(1.0)

def test_second(suite: Suite) -> None:
    raise AssertionError("the time is over")
"""


def test_each_contender_is_shown_and_the_budget_holds(tmp_path: Path) -> None:
    """In a process of its own, whose output pytest captures."""
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
        r"bench_sums test_first \| views 8 \| ours \| [\d.]+ ms \| 1 x ours",
        r"bench_sums test_first \| views 8 \| theirs \| [\d.]+ ms \| [\d.]+ x ours",
        r"bench_sums test_first: views 8; .+; \d+ rounds, median \(quartiles\)",
        r"  gone +not measured: not installed",
    ):
        assert re.search(f"^{line}$", done.stdout, re.MULTILINE), line
    assert "bench_sums.py::test_second: skipped: BENCH_SECONDS=1 are over" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout


def test_another_function_is_no_result() -> None:
    with pytest.raises(AssertionError, match=r"another function: loss 0.01, beyond 0.001"):
        Check("loss", 1e-2, 1e-3)
    with pytest.raises(AssertionError, match="another function"):
        Check("loss", float("nan"), 1e-3)


# The tables


def test_a_row_says_all_that_is_known(tmp_path: Path) -> None:
    more = {"peak_mib": {"ours": 12, "dense": 840}, "notes": {"dense": "as everyone writes it"}}
    more |= {"checks": {"dense": {"what": "loss, relative", "error": 2e-7, "bound": 1e-3}}, "missing": {"x": "no GPU"}}
    text = report(tmp_path, results(tmp_path / "cpu.json", measured({"dense": (2.8, 3.0, 3.2)}, **more)))
    assert row(text, "**ours**")[2:6] == ["1", "", "10.0 (10.0 to 10.0)", "12.0"]
    ratio, spread_of_it, time, peak, check = row(text, "dense")[2:]
    assert (ratio, spread_of_it, time) == ("3.00 (2.80 to 3.20)", "13%", "30.0 (28.0 to 32.0)")
    assert (peak, check) == ("840", "loss, relative: 2e-07 ≤ 0.001")
    assert "### views 512" in text
    assert "20 rounds on CPU [[1]](#measured-on) (cpu.json)" in text
    assert "- dense: as everyone writes it" in text
    assert "- not here: x: no GPU" in text
    assert "1. A CPU; 4 cores, 2 threads; Python 3.11.7, torch 2.15.0; commit c0ffee1; 2026-11-25\n" in text
    assert "No rival is faster" in text


def test_a_wide_spread_cannot_be_missed(tmp_path: Path) -> None:
    file = results(tmp_path / "a.json", measured({"steady": STEADY, "shaky": (0.9, 1.0, 1.24)}))
    text = report(tmp_path, file)
    assert row(text, "shaky")[3] == "**⚠ spread 34%**"
    assert row(text, "steady")[3] == "3%"


def test_ratios_are_per_image(tmp_path: Path) -> None:
    # A call of theirs takes three times as long, for a quarter of the images.
    file = results(tmp_path / "a.json", measured({"theirs": STEADY}, images={"ours": 256, "theirs": 64}))
    text = report(tmp_path, file)
    assert row(text, "theirs")[2] == "12.0 (11.8 to 12.2)"
    assert row(text, "theirs")[5] == "2,133"  # 64 in 30 ms
    assert row(text, "**ours**")[5] == "25,600"


def test_losses_are_published_beside_wins(tmp_path: Path) -> None:
    rivals = {"faster": (0.7, 0.8, 0.9), "about as fast": (0.9, 0.99, 1.1), "slower": STEADY}
    # Neither another setup of ours, nor a variant that only benchmarks/ has, nor other work is a rival.
    rivals |= {"ours, bf16": (0.4, 0.5, 0.6), "product": (0.1, 0.1, 0.1), "variant": (0.6, 0.6, 0.6)}
    kinds = {"ours": ["ours, bf16"], "tried": ["variant"], "yardsticks": ["product"]}
    file = results(tmp_path / "a.json", measured(rivals, **kinds))
    (found,), _ = read([file])
    assert [each.name for each in found.contenders] == [
        "ours",
        "product",
        "ours, bf16",
        "variant",
        "faster",
        "about as fast",
        "slower",
    ]
    assert [each.kind for each in found.contenders[:4]] == [Kind.FIRST, Kind.YARDSTICK, Kind.OURS, Kind.TRIED]
    text = report(tmp_path, file)
    assert "- variant: ours, tried in benchmarks/ only\n" in text
    lost = [line for line in text.partition("## Where we lose")[2].partition("##")[0].splitlines() if line]
    assert [line.split("**")[1] for line in lost] == ["faster", "about as fast"]
    assert "0.800 (0.700 to 0.900) times as long as ours" in lost[0]
    assert [line.endswith("within the noise") for line in lost] == [False, True]
    assert row(text, "faster")[2].startswith("0.800")


def test_a_rival_that_holds_less_is_a_loss_too(tmp_path: Path) -> None:
    peaks = {"ours": 12.0, "smaller": 8.0, "larger": 16.0, "unknown": None}
    file = results(
        tmp_path / "a.json", measured(dict.fromkeys(["smaller", "larger", "unknown"], STEADY), peak_mib=peaks)
    )
    lost = report(tmp_path, file).partition("## Where we lose")[2].partition("##")[0]
    assert [line.partition("**")[2] for line in lost.splitlines() if line] == [
        "smaller** holds 8.00 MiB at most, ours 12.0"
    ]


def test_devices_and_commits_of_a_benchmark_share_its_table(tmp_path: Path) -> None:
    cpu = results(tmp_path / "cpu.json", measured({"dense": STEADY}))
    later = results(tmp_path / "later.json", measured({"dense": STEADY}), commit="decade2" + 33 * "0")
    gpu = results(tmp_path / "gpu.json", measured({"dense": STEADY}, device="NVIDIA H200"))
    text = report(tmp_path, cpu, later, gpu)
    assert text.count("### views 512") == 1
    rows = [line.split(" | ") for line in text.splitlines() if " | dense | " in line]
    assert [cells[0].split("]")[0] for cells in rows] == ["| CPU [[1", "| CPU [[2", "| H200 [[3"]
    assert "commit decade2" in text
    assert "3. NVIDIA H200, on A CPU;" in text


def test_each_group_has_a_chart(tmp_path: Path) -> None:
    # The last one's rival is beyond any axis, and nothing of memory is known.
    benchmarks = [
        measured({"dense": STEADY}, group="NT-Xent, forward", peak_mib={"ours": 1.0, "dense": 30.0}),
        measured({"dense": STEADY, "none": (0.5, 0.6, 0.7)}, group="NT-Xent, forward", views=4096),
        measured({"loop": (400, 500, 600)}, group="LARS"),
    ]
    text = report(tmp_path, results(tmp_path / "a.json", *benchmarks))
    for name in ("nt-xent-forward.png", "lars.png"):
        assert f"]({name})" in text
        assert (tmp_path / "made" / name).read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_without_contenders_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = {"group": None, "name": "test_memory", "extra_info": {"mib": 3}}
    files = [results(tmp_path / "new.json", measured({"d": STEADY})), results(tmp_path / "alone.json", alone)]
    text = report(tmp_path, *files)
    line = "alone.json: left out 1 benchmark without contenders"
    assert line in text
    assert line in capsys.readouterr().out


# Mistakes


def mistakes(folder: Path) -> dict[str, list[Path | str]]:
    good = results(folder / "good.json", measured({"dense": STEADY}))
    alone = results(folder / "alone.json", {"group": None, "name": "test_memory", "extra_info": {}})
    (folder / "list.json").write_text("[]")
    (folder / "text.json").write_text("no JSON")
    (folder / "plain.md").write_text("# No markers\n")
    return {
        "missing.json: No such file": [folder / "missing.json", "--output", folder / "out"],
        "list.json: is not what pytest benchmarks": [folder / "list.json", "--output", folder / "out"],
        "text.json: is no JSON": [folder / "text.json", "--output", folder / "out"],
        "alone.json: left out 1 benchmark": [alone, "--output", folder / "out"],
        "say what to make": [good],
        "--check goes with --readme": [good, "--output", folder, "--check"],
        "plain.md: has no lines <!--": [good, "--readme", folder / "plain.md"],
        "none.md: No such file": [good, "--readme", folder / "none.md"],
    }


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for message, arguments in mistakes(tmp_path).items():
        with pytest.raises(SystemExit) as stopped:
            main([str(each) for each in arguments])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


# The README


def test_the_readme_gets_a_row_of_each_headline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"peak_mib": {"ours": 12, "dense": 840, "lightly": 1076}, "yardsticks": ["product"]}
    more |= {"ours": ["bf16"], "tried": ["variant"]}
    rivals = {"lightly": (6.0, 8.0, 10.0), "product": STEADY, "dense": (0.9, 0.95, 0.97), "bf16": (0.5, 0.5, 0.5)}
    rivals |= {"variant": (2, 2, 2)}
    file = results(
        tmp_path / "a.json",
        measured(rivals, **more),
        measured({"dense": STEADY}, views=64, headline=False),
        measured({"loop": STEADY}, group="views", images={"ours": 64, "loop": 64}),
    )
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nolder figures\n{END}\nafter\n")
    command = [str(file), "--readme", str(readme)]
    assert main([*command, "--check"]) == 1
    assert "older figures" in readme.read_text()
    assert main(command) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| ")
    assert text.endswith(f"\n{END}\nafter\n")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert rows == [
        "| loss; views 512 | CPU [1] | 10.0 ms (ours) | dense **0.950×**; lightly 8.00× ⚠; "
        "ours, set up otherwise: bf16 0.500×; ours, tried in benchmarks/ only: variant 2.00× | 12.0, 840 |",
        "| views; views 512 | CPU [1] | 6,400 images/s (ours) | loop 3.00× |  |",
    ]
    assert "⚠: the ratio's quartiles" in text
    assert "[1] A CPU; 4 cores, 2 threads; Python 3.11.7, torch 2.15.0; commit c0ffee1; 2026-11-25" in text
    capsys.readouterr()
    assert main([*command, "--check"]) == 0
    assert "as measured" in capsys.readouterr().out


def test_our_readme_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--readme", str(ROOT / "README.md"), "--check"]) == 0, capsys.readouterr().out
