"""Take the first batch of a dataset in this process, and print times and memory as one line of JSON.

    python -m benchmarks.first_batch fastsimclr|torchvision PATH

imports_s, open_s, batch_s: seconds of the imports, of opening the loader, and from there to the first batch.
open_mib: largest private and shared memory while the loader is opened, beyond the imports. worker_mib: largest private
memory of a worker after the first batch.
"""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BATCH, WORKERS = 64, 2


def own_mib() -> float:
    """Return the memory of this process that is not mapped from files, in MiB."""
    status = Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem"))) / 1024


def private_mib(process: int) -> float:
    """Return the memory that only `process` has, in MiB."""
    rollup = Path("/proc", str(process), "smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private")) / 1024


def descendants(process: int) -> list[int]:
    tasks = Path("/proc", str(process), "task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return children + [each for child in children for each in descendants(child)]


class Peak:
    """Context that samples `own_mib` every 10 ms."""

    def __enter__(self) -> "Peak":
        self.before = self.mib = own_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self.mib = max(self.mib, own_mib())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.mib = max(self.mib, own_mib())


def import_fastsimclr() -> None:
    import fastsimclr.data.dataset
    import fastsimclr.data.torchvision  # noqa: F401


def open_fastsimclr(path: str) -> tuple[Iterable[Any], int, int]:
    from fastsimclr import Augmentation, open_views

    loader = open_views(path, Augmentation(), BATCH, backend="torchvision", workers=WORKERS)
    return loader, len(loader.source), len(loader.source.classes)


def import_torchvision() -> None:
    import torchvision.datasets
    import torchvision.transforms  # noqa: F401


def open_torchvision(path: str) -> tuple[Iterable[Any], int, int]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, RandomResizedCrop, ToTensor

    folder = ImageFolder(path, Compose([RandomResizedCrop(224), ToTensor()]))
    loader = DataLoader(folder, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    return loader, len(folder), len(folder.classes)


def main(contender: str, path: str) -> None:
    import_, open_ = {
        "fastsimclr": (import_fastsimclr, open_fastsimclr),
        "torchvision": (import_torchvision, open_torchvision),
    }[contender]
    times = [time.perf_counter()]
    import_()
    times.append(time.perf_counter())
    with Peak() as peak:
        loader, images, classes = open_(path)
    times.append(time.perf_counter())
    batches = iter(loader)
    next(batches)
    times.append(time.perf_counter())
    imports_s, open_s, batch_s = (after - before for before, after in itertools.pairwise(times))
    found = {"images": images, "classes": classes, "imports_s": imports_s, "open_s": open_s, "batch_s": batch_s}
    found |= {"open_mib": peak.mib - peak.before, "worker_mib": max(map(private_mib, descendants(os.getpid())))}
    print(json.dumps(found), flush=True)
    del batches, loader  # ends the workers
    os._exit(0)  # about one in fifteen of these processes aborts in the destructors at its exit, after the measurement


if __name__ == "__main__":
    main(*sys.argv[1:])
