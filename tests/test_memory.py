"""The memory that is available to this process, and its peak."""

import mmap
from pathlib import Path

import pytest
import torch

from fastsimclr import memory

CPU = torch.device("cpu")
MIB = 2**20


def use(mib: int) -> None:
    """Use so much memory for a moment, not from malloc, which may have kept that of earlier tests."""
    with mmap.mmap(-1, mib * MIB) as block:
        block[::4096] = bytes(mib * MIB // 4096)  # a byte of each page


def test_peak_is_beyond_what_was_held_before() -> None:
    peak = memory.watch_peak(CPU)
    assert peak() < MIB
    for mib in (64, 128, 64):
        use(mib)
    assert peak() == pytest.approx(128 * MIB, rel=0.1)
    peak = memory.watch_peak(CPU)
    assert peak() < MIB
    use(64)
    assert peak() == pytest.approx(64 * MIB, rel=0.1)


def test_available_memory_is_that_of_this_machine() -> None:
    available = memory.available_bytes(CPU)
    assert available is not None
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 0 < available < total * 2**10


def make_cgroup(folder: Path, limit: str, used: int, files: int, *, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 5\n{'inactive_file' if version == 2 else 'total_inactive_file'} {files}\n"
    )


def left(membership: str, root: Path) -> list[int]:
    return list(memory._left_in_cgroups(membership, root))


def test_limits_of_the_cgroup_and_its_parents_count(tmp_path: Path) -> None:
    make_cgroup(tmp_path / "job/step", "1000", 300, 100, version=2)
    make_cgroup(tmp_path / "job", "900", 400, 0, version=2)
    make_cgroup(tmp_path, "max", 5000, 0, version=2)
    assert left("0::/job/step\n", tmp_path) == [800, 500]


def test_limits_of_version_1_count_also_where_the_path_is_that_of_the_host(tmp_path: Path) -> None:
    """A container sees its own cgroup at the mount, and may not see its path on the host."""
    make_cgroup(tmp_path / "memory", "1000", 300, 100, version=1)
    membership = "4:memory:/docker/0123\n3:cpuset:/docker/0123\n0::/docker/0123\n"
    assert left(membership, tmp_path) == [800]
    make_cgroup(tmp_path / "memory", str(2**63 - 4096), 300, 100, version=1)
    assert left(membership, tmp_path) == []
