"""What glibc's malloc does with freed blocks: mapping large ones again took a quarter of a training step on a CPU."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h


def keep_freed_memory() -> bool:
    """Make malloc allocate large blocks on the heap and keep them when they are freed, for training on a CPU.

    By default glibc maps each block of 32 MiB or more separately and unmaps it when it is freed. Activations are such
    blocks, so in every step the system maps and clears all of them again (measurements: benchmarks/NOTES.md). The cost:
    the process never shrinks, and a fragmented heap is larger than the memory in use.
    Returns whether the C library supports this: glibc does; with others nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never return memory


def return_freed_memory() -> None:
    """Return the pages of freed blocks to the system, so that resident memory is what is in use. Only glibc can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
