"""Own data and encoders, from pretrain() to evaluate: each kind trains, resumes to the same bits, and loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import photo
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastsimclr import load_encoder, pretrain
from fastsimclr.checkpoint_format import load_checkpoint
from fastsimclr.evaluate import main as evaluate
from fastsimclr.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

IMAGES = 24
OPTIONS: dict[str, Any] = {
    "image_size": 32,
    "batch_size": 8,
    "epochs": 2,
    "knn_k": 3,
    "precision": "fp32",
    "device": "cpu",
    "model": {"hidden": 16, "out": 8},
}


class Dicts(Dataset[dict[str, Any]]):
    """Items are dicts of an image (H, W, 3) uint8, of its own size, and a label."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": photo(40 + index % 3, 48, index), "label": index % 2}


class Floats(Dataset[tuple[Tensor, int]]):
    """Items are an image (3, H, W) in [0, 1] and a label."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(photo(40, 48, index)).permute(2, 0, 1) / 255, index % 2


def bands() -> np.ndarray:
    """Return images (N, H, W, 5) uint16 that use all 16 bits."""
    five = [np.concatenate([photo(36, 36, n), photo(36, 36, n + 100)[:, :, :2]], axis=2) for n in range(IMAGES)]
    return np.stack(five).astype(np.uint16) * 257


def labeled_bands() -> tuple[np.ndarray, np.ndarray]:
    return bands(), np.arange(IMAGES) % 2


def hugging_face() -> Any:
    datasets = pytest.importorskip("datasets")
    columns = {"picture": [photo(40, 48, n) for n in range(IMAGES)], "kind": [n % 2 for n in range(IMAGES)]}
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict(columns, features)


def tiffs(folder: Path) -> str:
    """Write 16-bit TIFFs of three channels in two class folders."""
    tifffile = pytest.importorskip("tifffile")
    for number, image in enumerate(bands()[..., :3]):
        file = folder / "ab"[number % 2] / f"{number:02}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(file, image, photometric="rgb")
    return str(folder)


def module(channels: int) -> nn.Module:
    """Return a module to feature maps (N, 12, h, w), with the weights of seed 0."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.1))
    return nn.Sequential(first, nn.Conv2d(8, 12, 3))


@pytest.mark.parametrize(
    ("make", "encoder", "channels", "options"),
    [
        (Dicts, lambda: "timm/vit_tiny_patch16_224", 3, {}),
        (Floats, lambda: "timm/convnext_atto", 3, {}),
        (labeled_bands, lambda: module(5), 5, {}),
        (hugging_face, lambda: "torchvision/efficientnet_b0", 3, {}),
        ("tiffs", lambda: "torchvision/mobilenet_v3_small", 3, {"pixels": "uint16"}),
    ],
    ids=["dicts", "floats", "five_bands", "hugging_face", "tiffs"],
)
def test_run_resumes_to_the_same_bits_and_is_evaluated(
    make: Any, encoder: Callable[[], Any], channels: int, options: dict[str, Any], working_directory: Path
) -> None:
    data = tiffs(working_directory / "tiffs") if make == "tiffs" else make()
    options = OPTIONS | options
    whole = pretrain(data, encoder(), output="whole", max_steps=4, **options)
    for max_steps in (2, 4):
        resumed = pretrain(data, encoder(), output="resumed", max_steps=max_steps, **options)
    states = [load_checkpoint(RunFolder(run.folder).checkpoint)["model"] for run in (whole, resumed)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert resumed.metrics["loss"].tolist() == whole.metrics["loss"].tolist()
    assert resumed.metrics["knn_step"].tolist() == [2, 4]  # at the end of each call
    assert resumed.knn_accuracy == whole.knn_accuracy

    images = torch.rand(2, channels, 32, 32)
    assert resumed.encoder(images).shape == (2, resumed.encoder.out_features)
    made = encoder()
    own = None if isinstance(made, str) else made
    # Not equal bits: the module that was trained has channels-last weights.
    torch.testing.assert_close(load_encoder("whole", encoder=own)(images), resumed.encoder(images))

    reference = f"--data.train={data}" if isinstance(data, str) else f"--data.train={__file__}:{make.__name__}"
    words = ["knn", "--checkpoint=whole", reference, "--k=3", "--precision=fp32", "--device=cpu", "--temperature=none"]
    if own is not None:
        Path("mymodule.py").write_text(
            f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"from {Path(__file__).stem} import module\nmake = lambda: module({channels})\n"
        )
        words.append("--encoder=mymodule.py:make")
    assert evaluate(words) == 0
    assert (Path("whole") / "evaluate" / "knn.json").is_file()
