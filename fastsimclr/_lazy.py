"""Import the names that a package exports on first use (https://peps.python.org/pep-0562).

`--help` and `import fastsimclr` then do not wait for PyTorch to be imported.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def export(package: str, exports: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package. exports: names to export, by the module that defines them."""
    module_of = {name: module for module, names in exports.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
