"""Encoders of timm and torchvision and a user's module in evaluate and embed."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from weights import randomize_norms, save_run

from fastsimclr import encoder
from fastsimclr.embed import main as embed
from fastsimclr.evaluate import main
from fastsimclr.imports import import_object
from fastsimclr.models import as_encoder

SIDE = 32
FAST = ["--precision=fp32", "--device=cpu"]
MODULE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 12, 3, stride=2), nn.BatchNorm2d(12), nn.Dropout(0.5)

    def forward(self, images):
        return self.drop(self.norm(self.conv(images)).relu())

made = Net()
"""
NET = "module_of_a_user.py:Net"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _module(working_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file with a user's module in the current directory, imported anew in each test."""
    Path("module_of_a_user.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("module_of_a_user", None)


def save(name: str) -> tuple[nn.Module, list[str]]:
    """Save an encoder in the run folder `run`; return it, and the options that load it."""
    module = import_object(name)() if name == NET else None
    torch.manual_seed(0)
    made = encoder(name, image_size=SIDE) if module is None else as_encoder(module, image_size=SIDE, channels=3)
    save_run(Path("run"), randomize_norms(made), "--data.train=digits", f"--data.image_size={SIDE}")
    return made, ["--checkpoint=run", *([] if module is None else [f"--encoder={name}"])]


def evaluate(*arguments: str) -> dict[str, Any]:
    """Run an evaluation and return its JSON record."""
    assert main([*arguments, *FAST, "--output=results"]) == 0
    (file,) = Path("results").glob("*.json")
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def error_of(command: Any, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must report a user error, and return the error."""
    assert command([*arguments, "--device=cpu"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


NAMES = ["timm/test_vit", "timm/test_convnext", "torchvision/mobilenet_v3_small", NET]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_linear_keeps_the_encoder_and_its_dropout_off(name: str) -> None:
    made, options = save(name)
    record = evaluate("linear", "--epochs=1", "--labels=0.1", *options)
    assert (record["encoder"]["name"], record["encoder"]["image_size"]) == ("module" if name == NET else name, SIDE)
    state = torch.load("results/linear-0.1.pt", weights_only=True)
    kept = made.module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    assert len(state) == len(kept) + 2
    assert 0.1 < record["top1"] <= 1


@pytest.mark.slow
def test_finetuned_state_loads_in_the_model_of_its_library() -> None:
    for name, build in (
        ("timm/test_vit", lambda: timm.create_model("test_vit", num_classes=10, img_size=SIDE)),
        ("timm/test_convnext", lambda: timm.create_model("test_convnext", num_classes=10)),
        ("torchvision/mobilenet_v2", lambda: torchvision.models.mobilenet_v2(num_classes=10)),
    ):
        made, options = save(name)
        evaluate("finetune", "--epochs=1", "--labels=0.05", *options, "--force")
        state = torch.load("results/finetune-0.05.pt", weights_only=True)
        build().load_state_dict(state, strict=True)
        first, weight = next(iter(made.module.named_parameters()))
        assert not torch.equal(state[first], weight)


@pytest.mark.parametrize("name", ["timm/test_vit", NET])
@pytest.mark.slow
def test_supervised_trains_a_new_encoder_by_name(name: str) -> None:
    options = ["--data.train=digits", f"--data.image_size={SIDE}", "--epochs=2", "--labels=0.2"]
    record = evaluate("supervised", f"--encoder={name}", *options)
    first, last = record["settings"]["epoch_losses"]
    assert last < first
    assert record["settings"]["optimizer"] == ("sgd" if name == NET else "adamw")


@pytest.mark.slow
def test_supervised_baseline_of_a_user_module_starts_from_new_weights(capsys: pytest.CaptureFixture[str]) -> None:
    made, options = save(NET)
    evaluate("supervised", "--epochs=1", "--labels=0.1", "--lr=1e-12", "--weight_decay=0", *options)
    state = torch.load("results/supervised-0.1.pt", weights_only=True)
    assert not torch.equal(state["conv.weight"], made.module.conv.weight)
    said = error_of(main, capsys, "supervised", "--checkpoint=run", "--encoder=module_of_a_user.py:made", "--output=o")
    assert "the module that holds the weights of --checkpoint" in said


@pytest.mark.slow
def test_embed_writes_the_features_of_a_user_module() -> None:
    made, options = save(NET)
    assert embed([*options, "--output=features", "--map=none", "--gallery=1", "--device=cpu"]) == 0
    features = np.load("features/features.npy")
    assert features.shape[1] == made.out_features == 12
    about = json.loads(Path("features/embed.json").read_text())
    assert about["encoder"] == {"name": "module", "width": 1, "stem": "imagenet", "image_size": SIDE, "channels": 3}


@pytest.mark.parametrize("command", [main, embed])
def test_user_error_is_one_line(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["knn"] if command is main else []
    save(NET)
    said = error_of(command, capsys, *start, "--checkpoint=run")
    assert "run: got weights of a module of your own, expected an instance of it" in said
    assert "--encoder FILE.py:FUNCTION" in said
    save("timm/vit_tiny_patch16_224")
    said = error_of(command, capsys, *start, "--checkpoint=run", f"--encoder={NET}")
    assert "run: got weights of timm/vit_tiny_patch16_224, expected no module for them" in said
    said = error_of(command, capsys, *start, "--checkpoint=run", "--encoder=timm/test_convnext")
    assert "run: got a timm/vit_tiny_patch16_224, expected a timm/test_convnext" in said
    said = error_of(command, capsys, *start, "--checkpoint=run", "--data.image_size=48")
    assert "timm/vit_tiny_patch16_224 on images of 3 x 48 x 48" in said
    made = encoder("timm/vit_tiny_patch16_224", image_size=SIDE, channels=5)
    save_run(Path("run"), made, "--data.train=digits", f"--data.image_size={SIDE}")
    said = error_of(command, capsys, *start, "--checkpoint=run")
    assert "got images of 3 channels, expected 5" in said
