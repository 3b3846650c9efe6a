"""Start of a process: time to the first batch, memory for the names of images, and CPU time of imports.

    python -m pytest benchmarks/bench_start.py --benchmark-json=benchmarks/results/start-DEVICE.json

A timed call starts a process, which opens a loader with two workers and takes its first batch of 64 images:
fastsimclr's with two views per image, and torchvision's ImageFolder with PyTorch's DataLoader and one crop per image.
The files are hard links to a few photographs. The members of the shards are small images.

The system has the entries of the folders in memory, as they were just written; dropping them takes root. On cold
storage, add the time in which it lists a folder: the first listing after a restart of the machine.
"""

import functools
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.first_batch import BATCH
from benchmarks.images import photographs
from benchmarks.suite import MIN_ROUNDS, SMALL, Suite, verdict

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 10 if SMALL else 1000
LINKS_PER_FILE = 50_000  # ext4 allows 65,000
SHARDS = 10
OPEN_MIB, WORKER_MIB, IMPORT_RATIO = 150.0, 20.0, 1.2  # targets
MODULES = ("fastsimclr", "torch", "torchvision", "fastsimclr.data.torchvision", "fastsimclr.training.pretrain")


@dataclass(frozen=True)
class Case:
    """A dataset. target_s: seconds to the first batch, beyond the imports."""

    name: str
    images: int
    write: Callable[[Path, int], str]
    target_s: float
    contenders: tuple[str, ...] = ("fastsimclr",)


def write_folders(folder: Path, images: int) -> str:
    """Write class folders of hard links to photographs, and return their path."""
    photos, _ = photographs(1 + images // LINKS_PER_FILE)
    folder.mkdir(exist_ok=True)
    for index in range(images):
        photo = folder / f".{index // LINKS_PER_FILE}.jpg"
        if index % LINKS_PER_FILE == 0:
            photo.write_bytes(photos[index // LINKS_PER_FILE % len(photos)])
        of_class = folder / "images" / f"n{index * CLASSES // images:08}"
        of_class.mkdir(parents=True, exist_ok=True)
        os.link(photo, of_class / f"{of_class.name}_{index}.JPEG")
    return str(folder / "images")


def write_shards(folder: Path, images: int) -> str:
    """Write tar shards of small images in class folders, and return their pattern."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "JPEG")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for index in range(shard * images // SHARDS, (shard + 1) * images // SHARDS):
                member = tarfile.TarInfo(f"n{index % CLASSES:08}/{index}.jpg")
                member.size = len(file.getvalue())
                tar.addfile(member, io.BytesIO(file.getvalue()))
    return str(folder / "*.tar")


CASES = (
    Case("folders", 1_000 if SMALL else 100_000, write_folders, 6, ("fastsimclr", "torchvision")),
    Case("shards", 1_000 if SMALL else 100_000, write_shards, 6),
    *([] if SMALL else [Case("many files", 1_281_000, write_folders, 20)]),
)
ROUNDS = 1 if SMALL else MIN_ROUNDS


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def first_batch(contender: str, path: str, found: list[dict[str, Any]]) -> None:
    """Take the first batch in a new process, and append its JSON to `found`."""
    found.append(json.loads(run_python("-m", "benchmarks.first_batch", contender, path)))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that is removed at once: pytest would keep a million links for later."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.benchmark(group="start to the first batch")
def test_first_batch(suite: Suite, case: Case, folder: Path) -> None:
    path = case.write(folder, case.images)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in case.contenders}
    suite.interleave(
        {name: functools.partial(first_batch, name, path, of_name) for name, of_name in found.items()},
        sizes={"data": case.name, "images": case.images, "classes": CLASSES},
        rounds=ROUNDS,
    )
    few: list[dict[str, Any]] = []
    first_batch("fastsimclr", write_folders(folder / "few", 10 * BATCH), few)
    seen = {(each["images"], each["classes"]) for each in itertools.chain(*found.values())}
    assert seen == {(case.images, CLASSES)}

    def median(name: str, what: str) -> float:
        return statistics.median(each[what] for each in found[name])

    ours, *others = case.contenders
    suite.record(
        peak_mib={name: median(name, "open_mib") for name in case.contenders},
        notes={
            name: f"imports {median(name, 'imports_s'):.1f} s, opening {median(name, 'open_s'):.2f} s, first batch "
            f"{median(name, 'batch_s'):.1f} s; opening takes that peak; a worker's private memory "
            f"{median(name, 'worker_mib'):.0f} MiB"
            for name in case.contenders
        },
        references=others,
    )
    seconds = median(ours, "open_s") + median(ours, "batch_s")
    names_mib = median(ours, "worker_mib") - few[0]["worker_mib"]
    suite.record_targets(
        verdict("seconds from the imports to the first batch", seconds, at_most=case.target_s),
        verdict("MiB of the process while opening", median(ours, "open_mib"), at_most=OPEN_MIB),
        verdict("MiB of a worker beyond one with few images", names_mib, at_most=WORKER_MIB),
    )


def import_module(module: str, cpu_s: list[float]) -> None:
    """Import the module in a new process, and append the CPU time of that process to `cpu_s`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_python("-c", f"import {module}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


@pytest.mark.benchmark(group="imports")
def test_imports(suite: Suite) -> None:
    cpu_s: dict[str, list[float]] = {module: [] for module in MODULES}
    suite.interleave(
        {module: functools.partial(import_module, module, of_module) for module, of_module in cpu_s.items()},
        sizes={"process": "new"},
        rounds=ROUNDS,
    )
    medians = {module: statistics.median(each) for module, each in cpu_s.items()}
    _, *others = MODULES
    suite.record(
        notes={module: f"{seconds:.2f} s of CPU time" for module, seconds in medians.items()}, references=others
    )
    ratio = medians["fastsimclr"] / medians["torch"]
    suite.record_targets(verdict("CPU time of import fastsimclr / import torch", ratio, at_most=IMPORT_RATIO))
