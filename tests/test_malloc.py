"""glibc malloc keeps and reuses freed memory: page faults and resident memory, measured in separate processes."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

FAULTS = """
import resource, torch
from fastsimclr.malloc import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def step():
    for _ in range(4):
        torch.ones(16 << 20)  # 64 MiB of float32: 16,384 pages
for _ in range(20):  # until small allocations no longer fragment the kept memory
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


BATCHES_HELD = """
import numpy as np, torch
from fastsimclr import Augmentation
from fastsimclr.data.params import sample_batch_params
from fastsimclr.data.photometric import photometric
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
images, augmentation = 32, Augmentation(image_size=224)
crops = torch.zeros(images, 224, 224, 3, dtype=torch.uint8)
params = sample_batch_params(augmentation, 0, 0, np.arange(images), np.full((images, 2), 224))
def batch(images=images):
    return [photometric(crops[:images], each[:images], augmentation) for each in params]
batch(1)
before = resident()
for _ in range(30):
    held = batch()  # the previous batch is freed after this one is made: two batches at most
    small = torch.empty(1000)
print((resident() - before) / sum(view.nbytes / 2**20 for view in held))
"""


def run(code: str) -> float:
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_reused() -> None:
    faults = [run(FAULTS.format(keep=keep)) for keep in (False, True)]
    # Systems differ in how many pages a fault maps (transparent huge pages).
    assert faults[1] * 10 < faults[0], faults


def test_views_reuse_the_memory_of_freed_views() -> None:
    """By default, glibc before 2.38 does not: this would take 3.5 batches here, and more in a loader."""
    assert run(BATCHES_HELD) < 3
