"""The fixture `suite` with the time budget of each file, and what every JSON says of the machine and the versions."""

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
    "pytorch-metric-learning",
    "pytest-benchmark",
)
BUDGETS = pytest.StashKey[dict[Path, Budget]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BUDGETS] = {}
    # pytest-benchmark warns of tests that were skipped; the second, where all were, outside of pytest's own filters.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    warnings.filterwarnings("ignore", "Not saving anything")


def say_on(config: pytest.Config) -> Callable[[str], None]:
    """A function that prints a line at once, whatever pytest captures."""
    capture = config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(line, flush=True)

    return say


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: start the file's budget, or skip a test that comes after its end."""
    if item.get_closest_marker("gpu") and not ON_GPU:
        pytest.skip("needs a CUDA GPU")
    budgets = item.config.stash[BUDGETS]
    budget = budgets.setdefault(item.path, Budget.from_environment())
    if budget.left() <= 0:
        reason = f"BENCH_SECONDS={budget.seconds:g} are over"
        say_on(item.config)(f"{item.path.name}::{item.name}: skipped: {reason}")
        pytest.skip(reason)


@pytest.fixture
def suite(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Suite:
    item = request.node
    of_file = [each for each in request.session.items if each.path == item.path]
    waiting = [each for each in of_file[of_file.index(item) :] if ON_GPU or not each.get_closest_marker("gpu")]
    say = say_on(item.config)
    say("")  # ends pytest's line of dots
    return Suite(benchmark, f"{item.path.stem} {item.name}", item.config.stash[BUDGETS][item.path], len(waiting), say)


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Where there is no git checkout, BENCH_COMMIT says what is measured: as `git describe --always --dirty` does."""
    if described := os.environ.get("BENCH_COMMIT"):
        commit_info.update(id=described.removesuffix("-dirty"), dirty=described.endswith("-dirty"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Replace pytest-benchmark's page (host name, kernel, every CPU flag) by what a figure depends on."""
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
