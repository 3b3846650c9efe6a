"""A run on images that are not 8-bit RGB."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fastsimclr.train import main

SMALL = {"model.encoder": "resnet18", "data.image_size": 16, "batch_size": 4, "epochs": 1, "device": "cpu"}
NO_COLOR = {"data.hue": 0, "data.saturation": 0, "data.grayscale_prob": 0}


def train(**options: Any) -> int:
    return main([f"--{name}={value}" for name, value in {**SMALL, **options}.items()])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders of arrays of five channels of 12 bits."""
    rng = np.random.default_rng(0)
    for number in range(8):
        (tmp_path / f"data/{number % 2}").mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 4096, (20, 21, 5)).astype(np.uint16)
        np.save(tmp_path / f"data/{number % 2}/{number}.npy", values)
    return tmp_path / "data"


@pytest.mark.slow
def test_train_records_the_pixels(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"data.train": folder, "data.value_range": "[0, 4095]", "output": tmp_path / "run"}
    assert train(**data) == 2
    message = capsys.readouterr().err
    assert "--data.saturation: got 0.8 for images of 5 channels" in message
    assert "--data.hue 0 --data.saturation 0 --data.grayscale_prob 0" in message
    assert train(**data, **NO_COLOR, **{"data.gain": 0.2, "data.rotate90_prob": 0.5}) == 0
    assert "(measured on 8 images, as the images have 5 channels)" in capsys.readouterr().out

    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]
    assert (recorded["pixels"], recorded["channels"], recorded["value_range"]) == ("uint16", 5, [0.0, 4095.0])
    assert len(recorded["mean"]) == len(recorded["std"]) == 5
