"""What is here, what will be used of it and why: for doctor to say, and for a run to keep."""

import platform
import subprocess
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsimclr import _extension, data, loss
from fastsimclr.data import native
from fastsimclr.data.sources import FolderSource
from fastsimclr.precision import choose_precision
from fastsimclr.version import __version__

OPTIONAL = {"umap-learn": "maps by UMAP instead of t-SNE", "onnxruntime": "export to ONNX", "timm": "use in timm"}
"""Packages that some command can do without, and what they are for."""


def installed(*packages: str) -> str | None:
    """The version of the first that is installed, by its metadata: importing it may fail, or take long."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def gpus_of_driver() -> list[list[str]]:
    """[name, driver's version] of each GPU, by nvidia-smi: it also sees those that torch does not."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.rsplit(", ", 1) for line in lines if ", " in line]


def gpus_of_torch() -> tuple[list[dict[str, Any]], str]:
    """The GPUs that torch can use; if there are none, what torch says of it."""
    with warnings.catch_warnings(record=True) as caught:  # a driver too old for this torch is a warning
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            return [], "; ".join(str(each.message).splitlines()[0] for each in caught)
    try:
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as error:  # a GPU in a bad state
        return [], str(error).splitlines()[0]
    return [{"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in gpus], ""


def choice(choose: Callable[[], tuple[str, str]]) -> dict[str, str]:
    """What would be taken, and why; or that nothing can be, and why."""
    try:
        backend, why = choose()
    except Exception as error:
        backend, why = "none", f"{type(error).__name__}: {error}"
    return {"backend": backend, "why": why.removeprefix("auto: ")}


def crops_and_colors(device: torch.device) -> tuple[str, str]:
    """The implementation of the views' operations on `device`, and why."""
    if native.is_compiled(device):
        return "compiled", "the extension has them for this device"
    return "pytorch", _extension.describe_build() if device.type == "cpu" else _extension.why_unavailable(device)


def advice(found: dict[str, Any], complaint: str) -> list[str]:
    """What to install to be faster, most effective first. complaint: torch's, of the GPU that it can't use."""
    if not found["gpus"] and not found["driver"]:
        return ["nothing to install: the fused loss and decoding by DALI on the GPU need an NVIDIA GPU"]
    if not found["gpus"]:
        if found["cuda_of_torch"] is None:
            return ["there is a GPU, but this torch is for the CPU: install a CUDA build of it, see pytorch.org"]
        return [f"torch can't use the GPU: {complaint or 'it does not say why; is CUDA_VISIBLE_DEVICES empty?'}"]
    lines = []
    if float(found["gpus"][0]["capability"]) >= 8:
        if found["extension"]["extension"] != "cuda":
            lines.append(
                "for the fused loss: g++ and CUDA's nvcc, then install fastsimclr again, with FASTSIMCLR_CUDA=1"
            )
        elif reason := _extension.why_unavailable(torch.device("cuda")):
            lines.append(f"for the fused loss: {reason}")
    if found["dali"] is None:
        cuda = (found["cuda_of_torch"] or "13").split(".")[0]
        lines.append(f"to decode images on the GPU: pip install nvidia-dali-cuda{cuda}0")
    return lines or ["nothing to install"]


def examine() -> dict[str, Any]:
    gpus, complaint = gpus_of_torch()
    driver = gpus_of_driver()
    device = torch.device("cuda" if gpus else "cpu")
    folder = FolderSource((), np.empty(0, np.int64), ())
    found: dict[str, Any] = {
        "fastsimclr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": installed("torchvision"),
        "dali": installed("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "cuda_of_torch": torch.version.cuda,
        "driver": driver[0][1] if driver else None,
        "gpus": gpus,
        "extension": {
            **_extension.build_info(),
            "description": _extension.describe_build().removeprefix("extension: "),
        },
        "loss": choice(lambda: loss.choose_backend("auto", device)),
        "crops_and_colors": choice(lambda: crops_and_colors(device)),
        "views_of_a_folder": choice(lambda: data.choose_backend(folder, device)),
        "precision": choose_precision("auto", device).why,
        "optional": {name: installed(name) for name in OPTIONAL},
    }
    return found | {"to_be_faster": advice(found, complaint)}


def describe(found: dict[str, Any]) -> str:
    """What examine() found, as text in two columns."""
    rows = [(name, found[name] or "not installed") for name in ("fastsimclr", "python", "torch", "torchvision", "dali")]
    rows.append(("cuda of torch", found["cuda_of_torch"] or "none: this torch is for the CPU"))
    rows.append(("driver", found["driver"] or "none: nvidia-smi names no GPU"))
    rows += [("gpu", f"{gpu['name']}, compute capability {gpu['capability']}") for gpu in found["gpus"]]
    rows += [] if found["gpus"] else [("gpu", "none that torch can use")]
    rows.append(("extension", found["extension"]["description"]))
    for name in ("loss", "crops_and_colors", "views_of_a_folder"):
        rows.append((name.replace("_", " "), f"{found[name]['backend']}: {found[name]['why']}"))
    rows.append(("precision", found["precision"]))
    rows += [(name, version or f"not installed (for {OPTIONAL[name]})") for name, version in found["optional"].items()]
    rows += [("to be faster", line) for line in found["to_be_faster"]]
    return "\n".join(f"{name:19}{text}" for name, text in rows)


def commit() -> str | None:
    """The commit of the checkout that this package runs from, "+" behind it where files differ; None without one."""
    folder = Path(__file__).resolve().parent
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--match=", "--dirty=+"],
            cwd=folder, check=True, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        tracked = subprocess.run(["git", "ls-files", Path(__file__).name], cwd=folder, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    # An installed package may lie inside somebody else's repository.
    return asked.stdout.strip() if tracked.stdout else None
