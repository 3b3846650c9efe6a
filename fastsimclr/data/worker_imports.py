"""What the forkserver of worker processes imports, once for all of them.

A forkserver that has started ends with its parent. While it imports, which may take ten seconds, the kernel has to end
it. It does so when the thread ends that has started it, so not for longer than that.
"""

import ctypes
import os
import signal
import sys
from types import TracebackType

_PARENT = "FASTSIMCLR_FORKSERVER_PARENT"  # environment variable with the id of the process that starts the forkserver
_PR_SET_PDEATHSIG = 1


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an error in starting a worker, unless its semaphores have gone: its parent has stopped meanwhile."""
    if not (isinstance(error, FileNotFoundError) and error.filename is None):
        sys.__excepthook__(kind, error, traceback)


if _PARENT in os.environ and sys.platform == "linux":
    _libc = ctypes.CDLL(None)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[_PARENT]):  # it was killed before
        os._exit(1)
    import fastsimclr.data.torchvision  # noqa: F401

    sys.excepthook = _report

    _libc.prctl(_PR_SET_PDEATHSIG, 0)
