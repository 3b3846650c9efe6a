"""The fixture `suite`, with a time budget for each file, and the machine and versions recorded in every JSON file."""

import os
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.suite import ON_GPU, Budget, Suite

PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "Pillow",
    "numpy",
    "timm",
    "lightly",
    "kornia",
    "webdataset",
    "spdl",
    "pytorch-metric-learning",
    "pytest-benchmark",
)
BUDGETS = pytest.StashKey[dict[Path, Budget]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BUDGETS] = {}
    # pytest-benchmark warns about skipped tests, and outside of pytest's filters if all tests are skipped.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    warnings.filterwarnings("ignore", "Not saving anything")


def uncaptured_print(config: pytest.Config) -> Callable[[str], None]:
    """Return a function that prints a line immediately, even if pytest captures the output."""
    capture = config.pluginmanager.getplugin("capturemanager")

    def write_line(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(line, flush=True)

    return write_line


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the file's budget before any fixture, or skip the test if the budget is used up."""
    if item.get_closest_marker("gpu") and not ON_GPU:
        pytest.skip("needs a CUDA GPU")
    budgets = item.config.stash[BUDGETS]
    budget = budgets.setdefault(item.path, Budget.from_environment())
    if budget.left() <= 0:
        reason = f"BENCH_SECONDS={budget.seconds:g} are used up"
        uncaptured_print(item.config)(f"{item.path.name}::{item.name}: skipped: {reason}")
        pytest.skip(reason)


@pytest.fixture
def suite(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Suite:
    item = request.node
    in_file = [each for each in request.session.items if each.path == item.path]
    remaining = [each for each in in_file[in_file.index(item) :] if ON_GPU or not each.get_closest_marker("gpu")]
    write_line = uncaptured_print(item.config)
    write_line("")  # ends pytest's line of dots
    return Suite(
        benchmark, f"{item.path.stem} {item.name}", item.config.stash[BUDGETS][item.path], len(remaining), write_line
    )


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Take the commit from BENCH_COMMIT, as `git describe --always --dirty` prints it, where there is no checkout."""
    if described := os.environ.get("BENCH_COMMIT"):
        commit_info.update(id=described.removesuffix("-dirty"), dirty=described.endswith("-dirty"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Replace pytest-benchmark's data (host name, kernel, every CPU flag) by what the figures depend on."""
    cpu = machine_info["cpu"]
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", "unknown"),
        cores=os.cpu_count(),
        torch_threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if ON_GPU else None,
        python=".".join(cpu.get("python_version", "unknown").split(".")[:3]),
        packages=packages,
    )
