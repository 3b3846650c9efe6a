"""What is here, what will be used, why, and what to install to be faster.

It ends with 0 whatever is missing: to say so is what it is for.
"""

import argparse
import json
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

import fastsimclr
from fastsimclr import data, loss
from fastsimclr.data.sources import FolderSource
from fastsimclr.loss import fused


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


def advice(found: dict[str, Any], complaint: str) -> list[str]:
    """What to install to be faster, most effective first. complaint: torch's, of the GPU that it can't use."""
    if not found["gpus"] and not found["driver"]:
        return ["nothing to install: the fused loss and decoding by DALI on the GPU need an NVIDIA GPU"]
    if not found["gpus"]:
        if found["cuda_of_torch"] is None:
            return ["there is a GPU, but this torch is for the CPU: install a CUDA build of it, see pytorch.org"]
        return [f"torch can't use the GPU: {complaint or 'it does not say why; is CUDA_VISIBLE_DEVICES empty?'}"]
    lines = []
    if found["extension"]["extension"] != "cuda" and float(found["gpus"][0]["capability"]) >= 8:
        lines.append("for the fused loss: g++ and CUDA's nvcc, then install fastsimclr again, with FASTSIMCLR_CUDA=1")
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
        "fastsimclr": fastsimclr.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": installed("torchvision"),
        "dali": installed("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "cuda_of_torch": torch.version.cuda,
        "driver": driver[0][1] if driver else None,
        "gpus": gpus,
        "extension": {**fused.build_info(), "description": fused.describe_build().removeprefix("extension: ")},
        "loss": choice(lambda: loss.choose_backend("auto", device)),
        "views_of_a_folder": choice(lambda: data.choose_backend(folder, device)),
    }
    return found | {"to_be_faster": advice(found, complaint)}


def describe(found: dict[str, Any]) -> str:
    """The same for people, in two columns."""
    rows = [(name, found[name] or "not installed") for name in ("fastsimclr", "python", "torch", "torchvision", "dali")]
    rows.append(("cuda of torch", found["cuda_of_torch"] or "none: this torch is for the CPU"))
    rows.append(("driver", found["driver"] or "none: nvidia-smi names no GPU"))
    rows += [("gpu", f"{gpu['name']}, compute capability {gpu['capability']}") for gpu in found["gpus"]]
    rows += [] if found["gpus"] else [("gpu", "none that torch can use")]
    rows.append(("extension", found["extension"]["description"]))
    for name in ("loss", "views_of_a_folder"):
        rows.append((name.replace("_", " "), f"{found[name]['backend']}: {found[name]['why']}"))
    rows += [("to be faster", line) for line in found["to_be_faster"]]
    return "\n".join(f"{name:19}{text}" for name, text in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastsimclr.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same for programs")
    options = parser.parse_args(arguments)
    found = examine()
    print(json.dumps(found, indent=2) if options.json else describe(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
