"""Memory of this process: what is available to it, and its peak."""

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastsimclr.malloc import return_freed_memory

_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # bytes; cgroup v1 has a number near 2^63 for no limit


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that this process can still allocate on the device, by itself; None if that is not known.

    On a CPU: what Linux reports as available, or what the limits of the process's cgroups leave, if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    if not sys.platform.startswith("linux"):
        return None
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 2**10
    return max(0, min([available, *_left_in_cgroups(Path("/proc/self/cgroup").read_text(), _CGROUPS)]))


def _left_in_cgroups(membership: str, root: Path) -> Iterator[int]:
    """Yield what each limited cgroup, and each of its parents, leaves.

    membership: the text of /proc/self/cgroup. root: where the cgroups are mounted, versions 1 and 2.
    """
    for line in membership.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, limit_name, usage_name = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit_name, usage_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in [group, *group.parents]:
            if folder.is_relative_to(mount) and (left := _left_in(folder, limit_name, usage_name)) is not None:
                yield left


def _left_in(folder: Path, limit_name: str, usage_name: str) -> int | None:
    """Return what a cgroup leaves; None if it has no limit, or is not visible in this container."""
    try:
        limit, used = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= _UNLIMITED:
        return None
    files = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
    return int(limit) - used + files  # cached files count as used, but the kernel can drop them


def watch_peak(device: torch.device) -> Callable[[], int]:
    """Return a function that returns the peak memory since now, beyond what this process holds now.

    On a GPU: what PyTorch's allocator reserves. On a CPU: resident memory, which includes what malloc has kept and what
    matrix libraries allocate. Raises OSError on a CPU where Linux does not report or reset it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        reserved = torch.cuda.memory_reserved(device)
        return lambda: torch.cuda.max_memory_reserved(device) - reserved
    return_freed_memory()  # it would be used again, and so not count as needed
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present value
    resident = _status_bytes("VmRSS")
    return lambda: _status_bytes("VmHWM") - resident


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 2**10 for line in status.splitlines() if line.startswith(f"{name}:"))
