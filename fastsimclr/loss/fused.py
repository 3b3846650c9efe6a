"""The compiled extension as the rest of the package sees it: what it is, and why it is not more."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

try:
    import fastsimclr._C as _C

    _import_error = None
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = error

# Written by setup.py: {"extension": "none" | "cpu" | "cuda", "reason": why it is not more}.
_RECORD = Path(__file__).parents[1] / f"_build.{sys.implementation.cache_tag}.json"


def is_available() -> bool:
    """Whether the fused NT-Xent loss can run here: the extension holds its kernel and there is a CUDA GPU."""
    return hasattr(_C, "nt_xent_forward") and torch.cuda.is_available()


def build_info() -> dict[str, Any]:
    """What the extension is made of.

    extension: "cuda", "cpu" or "none"; reason: why it is not "cuda", else "".
    With an extension also version, compiler ("g++ 12.2"), cuda (nvcc's version, "13.0"), cuda_runtime and
    architectures (["sm_80", "sm_90"]); on a CPU build these are None, None and [].
    """
    recorded = json.loads(_RECORD.read_text()) if _RECORD.exists() else {"extension": None, "reason": ""}
    if _C is not None:
        info = _C.build_info()
        extension = "cuda" if info["cuda"] else "cpu"
        # A library that was built with CMake by hand may be of another kind than the one in the record.
        reason = recorded["reason"] if recorded["extension"] == extension else ""
        return {"extension": extension, "reason": reason, **info}
    if recorded["extension"] == "none":
        return recorded
    if not isinstance(_import_error, ModuleNotFoundError):
        reason = f"it is there, but can't be imported: {_import_error}; install fastsimclr again"
    elif recorded["extension"] is None:
        reason = "it was never built for this Python; run: pip install -e ."
    else:
        reason = "it was built, but the file is gone; install fastsimclr again"
    return {"extension": "none", "reason": reason}


def describe_build() -> str:
    """One line for people: "extension: CUDA 13.0 for sm_80, sm_90 (g++ 12.2)"."""
    info = build_info()
    if info["extension"] == "none":
        return f"extension: none ({info['reason']})"
    if info["extension"] == "cpu":
        return f"extension: CPU only ({info['reason'] or 'built without CUDA'})"
    return f"extension: CUDA {info['cuda']} for {', '.join(info['architectures'])} ({info['compiler']})"
