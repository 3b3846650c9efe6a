"""Types of the compiled extension (csrc/bindings.cpp)."""

from typing import Any

def build_info() -> dict[str, Any]: ...
