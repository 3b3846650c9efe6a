"""Report what is installed, what will be used and why: for fastsimclr.doctor and a run's environment.json."""

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

OPTIONAL = {"umap-learn": "UMAP maps instead of t-SNE", "onnxruntime": "ONNX export", "timm": "timm encoders"}
"""Optional packages and what they are for."""


def installed(*packages: str) -> str | None:
    """Return the version of the first installed package, from its metadata: importing it may fail or be slow."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def driver_gpus() -> list[list[str]]:
    """Return [name, driver version] of each GPU from nvidia-smi, including GPUs that PyTorch cannot use."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.rsplit(", ", 1) for line in lines if ", " in line]


def torch_gpus() -> tuple[list[dict[str, Any]], str]:
    """Return the GPUs that PyTorch can use; if there are none, also PyTorch's reason, if it reports one."""
    with warnings.catch_warnings(record=True) as caught:  # PyTorch warns about a driver that is too old for it
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            return [], "; ".join(str(each.message).splitlines()[0] for each in caught)
    try:
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as error:  # a GPU in a bad state
        return [], str(error).splitlines()[0]
    return [{"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in gpus], ""


def choice(choose: Callable[[], tuple[str, str]]) -> dict[str, str]:
    """Return the backend that would be used and why; backend "none" if choosing one fails."""
    try:
        backend, why = choose()
    except Exception as error:
        backend, why = "none", f"{type(error).__name__}: {error}"
    return {"backend": backend, "why": why.removeprefix("auto: ")}


def crops_and_colors(device: torch.device) -> tuple[str, str]:
    """Return the implementation of the crop and color operations on `device`, and why."""
    if native.is_compiled(device):
        return "compiled", "the extension supports this device"
    return "pytorch", _extension.describe_build() if device.type == "cpu" else _extension.why_unavailable(device)


def advice(found: dict[str, Any], torch_reason: str) -> list[str]:
    """Return what to install for more speed, most effective first. torch_reason: why PyTorch can't use the GPU."""
    if not found["gpus"] and not found["driver"]:
        return ["nothing to install: the fused loss and DALI's GPU decoding need an NVIDIA GPU"]
    if not found["gpus"]:
        if found["cuda_of_torch"] is None:
            return ["this machine has a GPU, but PyTorch is a CPU build: install a CUDA build, see pytorch.org"]
        return [f"PyTorch can't use the GPU: {torch_reason or 'no reason reported; is CUDA_VISIBLE_DEVICES empty?'}"]
    lines = []
    if float(found["gpus"][0]["capability"]) >= 8:
        if found["extension"]["extension"] != "cuda":
            lines.append(
                "for the fused loss: install g++ and CUDA's nvcc, then reinstall fastsimclr with FASTSIMCLR_CUDA=1"
            )
        elif reason := _extension.why_unavailable(torch.device("cuda")):
            lines.append(f"for the fused loss: {reason}")
    if found["dali"] is None:
        cuda = (found["cuda_of_torch"] or "13").split(".")[0]
        lines.append(f"to decode images on the GPU: pip install nvidia-dali-cuda{cuda}0")
    return lines or ["nothing to install"]


def examine() -> dict[str, Any]:
    gpus, torch_reason = torch_gpus()
    driver = driver_gpus()
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
    return found | {"to_be_faster": advice(found, torch_reason)}


def describe(found: dict[str, Any]) -> str:
    """Format the result of examine() as text in two columns."""
    rows = [(name, found[name] or "not installed") for name in ("fastsimclr", "python", "torch", "torchvision", "dali")]
    rows.append(("torch CUDA", found["cuda_of_torch"] or "none: PyTorch is a CPU build"))
    rows.append(("driver", found["driver"] or "none: nvidia-smi finds no GPU"))
    rows += [("gpu", f"{gpu['name']}, compute capability {gpu['capability']}") for gpu in found["gpus"]]
    rows += [] if found["gpus"] else [("gpu", "none that PyTorch can use")]
    rows.append(("extension", found["extension"]["description"]))
    for name in ("loss", "crops_and_colors", "views_of_a_folder"):
        rows.append((name.replace("_", " "), f"{found[name]['backend']}: {found[name]['why']}"))
    rows.append(("precision", found["precision"]))
    rows += [(name, version or f"not installed (for {OPTIONAL[name]})") for name, version in found["optional"].items()]
    rows += [("for more speed", line) for line in found["to_be_faster"]]
    return "\n".join(f"{name:19}{text}" for name, text in rows)


def commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with "+" appended if files differ; else None."""
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--match=", "--dirty=+"],
            cwd=folder, check=True, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        tracked = subprocess.run(["git", "ls-files", Path(__file__).name], cwd=folder, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    # An installed package may be inside an unrelated repository.
    return described.stdout.strip() if tracked.stdout else None
