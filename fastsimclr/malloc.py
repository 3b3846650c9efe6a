"""Tune glibc malloc to reuse large freed blocks: on a CPU a quarter of a step was spent on mapping them again."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Have malloc serve large blocks from the heap, and keep them when they are freed: for training on a CPU.

    By default glibc maps each block of 32 MiB or more by itself and unmaps it when it is freed. Activations are such
    blocks, so every step has the system map, and clear, all of them again (measured: benchmarks/NOTES.md). The price is
    that the process stays as large as it has ever been, and a fragmented heap is larger than what is in use.
    Returns whether this C library knows how (glibc does; on others nothing changes).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never give back
