"""Types of _emulated, only in editable builds: the kernels of _C, emulated on the CPU for tests (csrc/emulation)."""

from fastsimclr._C import *  # noqa: F403
