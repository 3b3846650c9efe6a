"""The user's cache folder: results that all runs share, such as file lists and the results of `fastsimclr doctor`."""

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastsimclr.run_folder import replace_atomically

_noted: set[Path] = set()  # folders that are known not to be writable


def cache_folder(option: str | Path | None = None) -> Path:
    """Return the cache folder: `option` (--data.cache), else fastsimclr in $XDG_CACHE_HOME, else ~/.cache/fastsimclr.

    It may not exist; `write_to_cache` creates it.
    """
    if option is not None:
        return Path(option).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: relative paths are ignored
        return Path(base) / "fastsimclr"
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        return Path(home) / ".cache" / "fastsimclr"
    return Path(tempfile.gettempdir()) / f"fastsimclr-{os.getuid()}"  # a user without a home, as in containers


def write_to_cache(file: Path, write: Callable[[Path], object]) -> bool:
    """Replace `file`, in the cache folder, atomically with the one that `write` writes. Returns whether that worked.

    Several processes and nodes may write the same file: the last one wins. Where nothing can be written, as in a
    read-only folder or on a full disk, one note on stderr says so, and nothing is cached.
    """
    partial = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with replace_atomically(file, partial):
            write(partial)
    except OSError as error:
        if file.parent not in _noted:
            print(f"{file.parent}: cannot be written ({error.strerror}); nothing is cached there", file=sys.stderr)
        _noted.add(file.parent)
        return False
    return True
