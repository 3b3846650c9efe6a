"""Objects of the user's own code, by reference: `mydata.py:make_dataset` or `package.module:object`."""

import difflib
import importlib
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from fastsimclr.errors import UserError

_REFERENCE = re.compile(r"(?P<module>.+\.py|[^\W\d]\w*(\.[^\W\d]\w*)+):(?P<name>[^\W\d]\w*)")


def is_object_reference(text: str) -> bool:
    """Return whether `text` is a reference to an object: FILE.py:NAME or PACKAGE.MODULE:NAME.

    A module without a dot is no reference, as `cifar10:ROOT` has that form. Neither is a URL or an existing path.
    """
    return "://" not in text and _REFERENCE.fullmatch(text) is not None and not Path(text).exists()


def import_object(reference: str) -> Any:
    """Import the object of a reference FILE.py:NAME or MODULE:NAME.

    A file is imported as a module of its name, and its folder put first on sys.path, as Python does for a script: so
    worker processes can import it too. For a module, the working directory is on the path.
    Raises UserError if there is no such file, module or name, or if importing it fails.
    """
    target, _, name = reference.rpartition(":")
    if not target or not name.isidentifier():
        raise UserError(f"got {reference!r}, expected FILE.py:NAME or PACKAGE.MODULE:NAME")
    module = _import_file(Path(target)) if target.endswith(".py") else _import_module(target, Path.cwd())
    if not hasattr(module, name):
        names = [public for public in vars(module) if not public.startswith("_")]
        near = ", ".join(difflib.get_close_matches(name, names, 3, cutoff=0.5))
        hint = f"did you mean {near}?" if near else "check the name"
        raise UserError(f"got {reference}, but {target} defines no {name!r}: {hint}")
    return getattr(module, name)


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"got {file}, expected an existing Python file")
    module = _import_module(file.stem, file.resolve().parent)
    origin = getattr(module, "__file__", None)
    if origin is None or not file.samefile(origin):
        raise UserError(f"got {file}, but {file.stem} is also the name of {origin or 'a built-in module'}: rename it")
    return module


def _import_module(name: str, folder: Path) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except Exception as error:  # of the user's code
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"got module {name}, which is not found in {folder} or among installed packages") from error
        raise UserError(
            f"got module {name}, which fails to import: {describe_failure(error)}{_where(error)}"
        ) from error


def describe_failure(error: Exception) -> str:
    """Describe an exception of a user's or a library's code in one line."""
    kind, message = type(error).__name__, str(error).strip()
    return f"{kind}: {message.splitlines()[0]}" if message else kind


def _where(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(last.filename).name}, line {last.lineno})"
