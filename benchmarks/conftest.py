"""What every benchmark's JSON says of the machine and the versions, and nothing more."""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch

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
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=".".join(cpu.get("python_version", "unknown").split(".")[:3]),
        packages=packages,
        # glibc's allocator decides how dear a temporary is: see bench_optimizer.py.
        malloc={name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    )
