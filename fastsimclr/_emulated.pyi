"""The twin of _C for tests, only in an editable build: the same functions, run on the CPU (csrc/emulation)."""

from fastsimclr._C import *  # noqa: F403
