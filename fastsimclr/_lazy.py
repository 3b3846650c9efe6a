"""Import the names that a package exports when they are first used.

`--help` and `import fastsimclr` then do not pay for PyTorch and what it brings (https://peps.python.org/pep-0562).
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def export(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that exports the names in `homes`: module -> the names that it defines."""
    module_of = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
