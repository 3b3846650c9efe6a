"""Memory, descriptors, threads, processes and shared memory of a run do not grow with its steps and epochs."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from faults.runs import LONG, TINY, Process, count_steps, fork, living, shared_memory
from pictures import photo_folder

LOADERS = {
    "memory": ["--data.backend=memory"],
    "torchvision": ["--data.backend=torchvision", "--data.workers=1"],
    "torchvision in this process": ["--data.backend=torchvision", "--data.workers=0"],
    "dali": ["--data.backend=dali", "--data.workers=1"],
}
MEMORY_MIB = 24
"""What memory may grow by: the allocators of up to three processes, whose use of pages varies."""


class Usage(NamedTuple):
    memory_mib: float
    descriptors: int
    threads: int
    processes: int
    shared_memory: int


def measure(before: set[str]) -> Usage:
    """The usage of all processes of the run. Memory: pages that several of them share count once.

    Pages of files are left out: their share changes when a process starts or ends that has nothing to do with the run.
    """
    kib, descriptors, threads, processes = 0.0, 0, 0, 0
    for pid in living():
        with contextlib.suppress(OSError):  # it has just ended
            lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            threads += len(os.listdir(f"/proc/{pid}/task"))
            kib += sum(int(line[1]) for line in lines if line[0] in ("Pss_Anon:", "Pss_Shmem:"))
            processes += 1
    return Usage(kib / 1024, descriptors, threads, processes, len(shared_memory() - before))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["steps", "epochs"])
def test_usage_is_flat(
    tmp_path: Path, loader: str, kind: str, nothing_left: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Many steps of one long epoch, or many epochs of two steps with kNN and a checkpoint each."""
    steps = (2000 if LONG else 120) if kind == "steps" else 2 * (100 if LONG else 8)
    photos = photo_folder(tmp_path / "photos", 16 if kind == "epochs" else 240, size=lambda _: (40, 50))
    options = [*TINY, f"--data.train={photos}", "--data.image_size=16", "--batch_size=8", *LOADERS[loader]]
    options += [f"--epochs={10 * steps}", f"--knn_every={kind == 'epochs':d}", f"--output={tmp_path / 'run'}"]
    before = shared_memory()
    (process,) = fork(*options)
    _wait_for_step(process, tmp_path / "run", steps // 4)
    usages = []
    for _ in range(60):  # over several epochs: the workers of a kNN measurement, for example, come and go
        usages.append(measure(before))
        time.sleep(0.05)
    first = Usage(*map(max, zip(*usages, strict=True)))
    _wait_for_step(process, tmp_path / "run", count_steps(tmp_path / "run") + steps)
    deadline = time.monotonic() + 30
    while not _is_as_before(last := measure(before), first) and time.monotonic() < deadline:
        time.sleep(0.05)
    with capsys.disabled():
        print(f"\n{loader}, {kind}, {steps} steps: {first} -> {last}")
    process.send_signal(15)
    process.end()
    nothing_left(tmp_path)
    assert _is_as_before(last, first)


def _is_as_before(last: Usage, first: Usage) -> bool:
    """Whether the run is back at its earlier usage: a leak never is. A batch on its way has up to 3 descriptors."""
    allowed = Usage(MEMORY_MIB, descriptors=3, threads=0, processes=0, shared_memory=3)
    return all(now <= then + more for now, then, more in zip(last, first, allowed, strict=True))


def _wait_for_step(process: Process, run: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while count_steps(run) < step:
        assert process.poll() is None, process.errors
        assert time.monotonic() < deadline
        time.sleep(0.1)
