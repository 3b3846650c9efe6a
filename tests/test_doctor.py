"""python -m fastsimclr.doctor: it reports what is installed and what is missing, and exits with 0 either way."""

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
from fastsimclr.data import open_source
from fastsimclr.doctor import main
from fastsimclr.precision import choose_precision

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def doctor(*arguments: str, **variables: str) -> str:
    """Run it in a new process as a user does, and return its stdout. Nothing may be printed on stderr."""
    command = [sys.executable, "-m", "fastsimclr.doctor", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return dict(json.loads(doctor("--json")))


def test_doctor_reports_what_will_be_used_and_why(found: dict[str, Any]) -> None:
    assert found["fastsimclr"] == fastsimclr.__version__
    assert found["torch"] == torch.__version__
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert f"extension: {found['extension']['description']}" == describe_build()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, why = loss.choose_backend("auto", device)
    assert found["loss"] == {"backend": backend, "why": why.removeprefix("auto: ")}
    assert found["precision"] == choose_precision("auto", device).why
    assert found["optional"]["timm"] == version("timm")
    assert all(line for line in found["to_be_faster"])


def test_doctor_reports_the_backend_of_a_folder_of_images(found: dict[str, Any], tmp_path: Path) -> None:
    Image.new("RGB", (120, 120)).save(tmp_path / "1.png")  # too large to be decoded once and kept
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, why = data.choose_backend(open_source(str(tmp_path)), device)
    assert found["views_of_a_folder"] == {"backend": backend, "why": why}


def test_the_text_is_in_two_columns() -> None:
    lines = doctor().splitlines()
    assert {"fastsimclr", "torch", "driver", "gpu", "extension", "loss", "views of a folder", "for more speed"} <= {
        line[:19].strip() for line in lines
    }
    assert all(line[:19].endswith(" ") and line[19] != " " for line in lines)


def test_doctor_reports_a_missing_gpu() -> None:
    """Without nvidia-smi (empty PATH) and with every GPU hidden, as on a laptop."""
    lines = dict(
        line.split(maxsplit=1)
        for line in doctor(PATH="", CUDA_VISIBLE_DEVICES="").splitlines()
        if " of " not in line[:19]
    )
    assert lines["driver"] == "none: nvidia-smi finds no GPU"
    assert lines["gpu"] == "none that PyTorch can use"
    assert lines["loss"].startswith("tiled: ")
    assert not lines["extension"].startswith("CUDA")


@pytest.mark.gpu
def test_doctor_reports_the_gpu_and_how_to_use_it(found: dict[str, Any]) -> None:
    assert found["gpus"][0]["name"] == torch.cuda.get_device_name(0)
    assert found["gpus"][0]["capability"] == "{}.{}".format(*torch.cuda.get_device_capability(0))
    hidden = json.loads(doctor("--json", CUDA_VISIBLE_DEVICES=""))
    assert hidden["gpus"] == []
    if hidden["driver"]:
        assert "PyTorch can't use the GPU" in hidden["to_be_faster"][0]


def test_encoders_are_listed_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    lines = doctor("--encoders", "*vit_b_1*").splitlines()
    assert lines == ["torchvision/vit_b_16", "1 encoder"]
    assert main(["--encoders", "*resnet19*"]) == 2
    assert "got '*resnet19*', which matches no encoder" in (error := capsys.readouterr().err)
    assert "the nearest are resnet18, " in error
