"""Loads the compiled extension, once, and finds out where its kernels can run.

`compiled` is fastsimclr._C: operations for CPUs and, in a CUDA build, the kernels. `emulated` is fastsimclr._emulated,
which only an editable build has: the same kernels run on the CPU, for tests. Each is None where it cannot be imported.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

compiled: Any
emulated: Any
try:
    import fastsimclr._C as compiled

    _import_error = None
except ImportError as error:
    compiled = None
    _import_error = error
try:
    import fastsimclr._emulated as emulated
except ImportError:
    emulated = None

OLDEST_GPU = (8, 0)  # compute capability: bf16 products and asynchronous copies
# Written by setup.py: {"extension": "none" | "cpu" | "cuda", "reason": why it is not more}.
_RECORD = Path(__file__).with_name(f"_build.{sys.implementation.cache_tag}.json")


@functools.cache  # asked for every loss and every batch of views
def why_unavailable(device: torch.device) -> str:
    """Why the kernels cannot run on `device`, or "" if they can. On the CPU they run emulated.

    The first call for a GPU loads a kernel of the loss and one of the views there. This finds what the compute
    capability does not tell: a driver older than the extension's CUDA runtime, or no machine code for this GPU.
    """
    if device.type == "cpu":
        return "" if emulated else "the emulation is only in an editable build (pip install -e .)"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and the kernels are for CUDA"
    if not hasattr(compiled, "probe"):
        return describe_build()
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"{name} has compute capability {capability[0]}.{capability[1]}; expected 8.0 or later"
    with torch.cuda.device(device):  # the extension has a CUDA runtime of its own; PyTorch restores the current device
        reason = compiled.probe(device=torch.cuda.current_device())
    if "InsufficientDriver" in reason:
        cuda = build_info()["cuda_runtime"]
        reason += f": update the NVIDIA driver to one for CUDA {cuda}, or build fastsimclr with an older CUDA toolkit"
    return reason and f"the kernels do not load on {name}: {reason} ({describe_build()})"


def build_info() -> dict[str, Any]:
    """How the extension was built.

    extension: "cuda", "cpu" or "none"; reason: why it is not "cuda", else "".
    With an extension also version, compiler ("g++ 12.2"), cuda (nvcc's version, "13.0"), cuda_runtime and
    architectures (["sm_80", "sm_90"]); on a CPU build these are None, None and [].
    """
    recorded = json.loads(_RECORD.read_text()) if _RECORD.exists() else {"extension": None, "reason": ""}
    if compiled is not None:
        info = compiled.build_info()
        extension = "cuda" if info["cuda"] else "cpu"
        # A library that was built with CMake by hand may be of another kind than the recorded one.
        reason = recorded["reason"] if recorded["extension"] == extension else ""
        return {"extension": extension, "reason": reason, **info}
    if recorded["extension"] == "none":
        return recorded
    if not isinstance(_import_error, ModuleNotFoundError):
        reason = f"it exists but cannot be imported: {_import_error}; install fastsimclr again"
    elif recorded["extension"] is None:
        reason = "it was never built for this Python; run: pip install -e ."
    else:
        reason = "it was built, but the file is gone; install fastsimclr again"
    return {"extension": "none", "reason": reason}


def describe_build() -> str:
    """One line: "extension: CUDA 13.0 for sm_80, sm_90 (g++ 12.2)"."""
    info = build_info()
    if info["extension"] == "none":
        return f"extension: none ({info['reason']})"
    if info["extension"] == "cpu":
        return f"extension: CPU only ({info['reason'] or 'built without CUDA'})"
    return f"extension: CUDA {info['cuda']} for {', '.join(info['architectures'])} ({info['compiler']})"
