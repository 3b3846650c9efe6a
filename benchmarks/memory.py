"""Peak memory of a call, in torch's allocator or in this process and all its workers."""

import ctypes
import gc
import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch


def peak_mib(call: Callable[[], object]) -> float:
    """Return the peak memory of torch's allocator during `call`, beyond what it held before.

    On a CPU it is measured by torch.profiler, without the scratch memory that matrix libraries allocate themselves.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = [event["args"] for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    allocated, peak = 0, 0
    for event in sorted(events, key=lambda event: event["Ev Idx"]):
        allocated += event["Bytes"]
        peak = max(peak, allocated)
    return peak / 2**20


def tree_mib() -> float:
    """Return the memory of this process and all its descendants (PSS, which counts shared memory once)."""
    total, waiting = 0.0, [os.getpid()]
    while waiting:
        folder = Path("/proc", str(waiting.pop()))
        try:
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
            rollup = (folder / "smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):  # the process has ended
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
    return total


def tree_peak_mib(call: Callable[[], object]) -> float:
    """Return the peak memory of this process and its workers while `call` runs, sampled every 50 ms."""
    samples, done = [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            samples.append(tree_mib())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        call()
    finally:
        done.set()
        sampler.join()
    return max(*samples, tree_mib())


def trimmed_mib() -> float:
    """Return the memory held after the heap has returned its unused memory, which the next contender could reuse."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    return tree_mib()


def settle_heap() -> None:
    """Free a block just under glibc's largest mmap threshold (32 MiB), as training does.

    From then on glibc keeps up to 64 MiB of freed memory.
    """
    torch.ones(31 * 2**18)
