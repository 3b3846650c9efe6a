"""Load the compiled extension once, and check on which devices its kernels can run.

`compiled` is fastsimclr._C: operations for the CPU and, in a CUDA build, the kernels. `emulated` is
fastsimclr._emulated, which only an editable build has: the same kernels, emulated on the CPU for tests. Each is None if
it cannot be imported.
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

MIN_CAPABILITY = (8, 0)  # compute capability with bf16 tensor cores and asynchronous copies
# Written by setup.py: {"extension": "none" | "cpu" | "cuda", "reason": why it is not "cuda"}.
_BUILD_RECORD = Path(__file__).with_name(f"_build.{sys.implementation.cache_tag}.json")


@functools.cache  # called for every loss and every batch of views
def why_unavailable(device: torch.device) -> str:
    """Return why the kernels cannot run on `device`, or "" if they can. On the CPU they are emulated.

    The first call for a GPU loads one kernel of the loss and one of the views on it. This detects what the compute
    capability does not show: a driver older than the extension's CUDA runtime, or no machine code for this GPU.
    """
    if device.type == "cpu":
        return "" if emulated else "emulated kernels need an editable install (pip install -e .)"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, but the kernels need CUDA"
    if not hasattr(compiled, "probe"):
        return describe_build()
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"{name} has compute capability {capability[0]}.{capability[1]}; expected 8.0 or later"
    with torch.cuda.device(device):  # the extension has its own CUDA runtime; PyTorch restores the current device
        reason = compiled.probe(device=torch.cuda.current_device())
    if "InsufficientDriver" in reason:
        cuda = build_info()["cuda_runtime"]
        reason += f": update the NVIDIA driver to support CUDA {cuda}, or build fastsimclr with an older CUDA toolkit"
    return reason and f"the kernels do not load on {name}: {reason} ({describe_build()})"


def build_info() -> dict[str, Any]:
    """Return how the extension was built.

    extension: "cuda", "cpu" or "none"; reason: why it is not "cuda", else "".
    If there is an extension, also version, compiler ("g++ 12.2"), cuda (nvcc's version, "13.0"), cuda_runtime and
    architectures (["sm_80", "sm_90"]); the last three are None, None and [] in a CPU build.
    """
    recorded = json.loads(_BUILD_RECORD.read_text()) if _BUILD_RECORD.exists() else {"extension": None, "reason": ""}
    if compiled is not None:
        info = compiled.build_info()
        extension = "cuda" if info["cuda"] else "cpu"
        # A library built by running CMake manually may differ from the recorded build.
        reason = recorded["reason"] if recorded["extension"] == extension else ""
        return {"extension": extension, "reason": reason, **info}
    if recorded["extension"] == "none":
        return recorded
    if not isinstance(_import_error, ModuleNotFoundError):
        reason = f"it exists but cannot be imported: {_import_error}; reinstall fastsimclr"
    elif recorded["extension"] is None:
        reason = "it was never built for this Python; run: pip install -e ."
    else:
        reason = "it was built, but its file is missing; reinstall fastsimclr"
    return {"extension": "none", "reason": reason}


def describe_build() -> str:
    """Return one line on the part of the extension that this machine can use.

    "extension: CUDA 13.0 for sm_80, sm_90 (g++ 12.2)", or without a GPU
    "extension: C++ for the CPU (its CUDA kernels for sm_80, sm_90 need a GPU)".
    """
    info = build_info()
    if info["extension"] == "none":
        return f"extension: none ({info['reason']})"
    if info["extension"] == "cpu":
        return f"extension: CPU only ({info['reason'] or 'built without CUDA'})"
    architectures = ", ".join(info["architectures"])
    if not torch.cuda.is_available():
        return f"extension: C++ for the CPU (its CUDA kernels for {architectures} need a GPU)"
    return f"extension: CUDA {info['cuda']} for {architectures} ({info['compiler']})"
