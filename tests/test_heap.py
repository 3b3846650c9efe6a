"""That a process keeps what it frees: counted in page faults, in a process of its own."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from fastsimclr.heap import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def step():
    for _ in range(4):
        torch.ones(16 << 20)  # 64 MiB of float32: 16,384 pages
for _ in range(20):  # until small blocks in between no longer cut what is kept
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_and_used_again() -> None:
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in (False, True)
    ]
    # By how many pages a fault brings (transparent huge pages) systems differ.
    assert faults[1] * 10 < faults[0], faults
