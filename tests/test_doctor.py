"""python -m fastsimclr.doctor: reports what is and is not available, and exits with code 0 in both cases."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastsimclr
from fastsimclr import data, loss
from fastsimclr._extension import describe_build
from fastsimclr.data.sources import open_source
from fastsimclr.precision import choose_precision

ROOT = Path(__file__).resolve().parents[1]


def doctor(*arguments: str, **variables: str) -> str:
    """Run doctor in a new process and return its stdout; stderr must be empty."""
    command = [sys.executable, "-m", "fastsimclr.doctor", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return dict(json.loads(doctor("--json")))


def test_reports_what_will_be_used_and_why(report: dict[str, Any]) -> None:
    assert report["fastsimclr"] == fastsimclr.__version__
    assert report["torch"] == torch.__version__
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert f"extension: {report['extension']['description']}" == describe_build()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, why = loss.choose_backend("auto", device)
    assert report["loss"] == {"backend": backend, "why": why.removeprefix("auto: ")}
    assert report["precision"] == choose_precision("auto", device).why
    assert report["optional"]["timm"] == version("timm")
    assert all(line for line in report["to_be_faster"])


def test_reports_the_loader_used_for_a_folder(report: dict[str, Any], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, why = data.choose_backend(open_source(str(tmp_path)), device)
    assert report["views_of_a_folder"] == {"backend": backend, "why": why}


def test_text_has_two_columns() -> None:
    lines = doctor().splitlines()
    assert {"fastsimclr", "torch", "driver", "gpu", "extension", "loss", "views of a folder", "to be faster"} <= {
        line[:19].strip() for line in lines
    }
    assert all(line[:19].endswith(" ") and line[19] != " " for line in lines)


def test_reports_that_no_gpu_is_found() -> None:
    """As on a laptop: without nvidia-smi (empty PATH) and with all GPUs hidden."""
    lines = dict(
        line.split(maxsplit=1)
        for line in doctor(PATH="", CUDA_VISIBLE_DEVICES="").splitlines()
        if " of " not in line[:19]
    )
    assert lines["driver"] == "none: nvidia-smi names no GPU"
    assert lines["gpu"] == "none that torch can use"
    assert lines["loss"].startswith("tiled: ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_reports_a_gpu_and_how_to_use_it(report: dict[str, Any]) -> None:
    assert report["gpus"][0]["name"] == torch.cuda.get_device_name(0)
    assert report["gpus"][0]["capability"] == "{}.{}".format(*torch.cuda.get_device_capability(0))
    hidden = json.loads(doctor("--json", CUDA_VISIBLE_DEVICES=""))
    assert hidden["gpus"] == []
    if hidden["driver"]:
        assert "torch can't use the GPU" in hidden["to_be_faster"][0]
