"""Loading encoders from files: restored weights, rejected files, and files that contain code."""

import argparse
import importlib.util
import json
import os
import pickle
import random
import sys
import types
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from checkpoints import make_state
from safetensors.torch import save_file
from torch import nn
from weights import outputs, randomize_norms, save_run

from fastsimclr import Augmentation, UserError, encoder, import_weights, load_encoder
from fastsimclr.checkpoint_format import load_checkpoint, write_checkpoint
from fastsimclr.models import EncoderSpec
from fastsimclr.pretrained import open_pretrained
from fastsimclr.train import main as train

pytestmark = pytest.mark.usefixtures("one_thread")


WIDE = {"encoder": {"name": "resnet18", "width": 9, "stem": "small"}}
"""An architecture that does not fit the weights of the other tests."""


def state_dict() -> dict[str, Any]:
    """Return the state dict of a torchvision ResNet-18 with fc."""
    return randomize_norms(torchvision.models.resnet18(num_classes=10)).state_dict()


# Runs


@pytest.mark.slow
def test_run_folder_and_checkpoint_load_the_trained_encoder(working_directory: Path) -> None:
    options = ["--data.train=digits", "--model.encoder=resnet18", "--max_steps=1", "--batch_size=32", "--knn_every=0"]
    assert train([*options, "--precision=fp64", "--data.image_size=32", "--output=run"]) == 0
    state = load_checkpoint(Path("run/checkpoints/last.pt"))["model"]
    for path in ("run", Path("run/checkpoints/last.pt")):
        opened = open_pretrained(path, "resnet18")
        assert opened.origin == "fastsimclr run, step 1"
        assert opened.augmentation == Augmentation(image_size=32)
        assert opened.config is not None
        assert opened.config["data"]["train"] == "digits"
        assert opened.encoder.spec.stem == "small"
        restored = opened.encoder.state_dict()
        assert len(restored) == sum(name.startswith("encoder.") for name in state)
        for name, value in restored.items():
            torch.testing.assert_close(value, state[f"encoder.{name}"], check_dtype=False, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("width", "stem"), [(1, "imagenet"), (2, "small")])
@pytest.mark.slow
def test_loading_gives_an_eval_mode_encoder_and_keeps_the_random_state(
    width: int, stem: str, working_directory: Path
) -> None:
    model = randomize_norms(encoder("resnet18", width, stem))
    save_run(Path("run"), model)
    before = torch.get_rng_state()
    loaded = load_encoder("run")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in loaded.modules())
    assert {value.device.type for value in loaded.state_dict().values()} == {"cpu"}
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert all(value.requires_grad for value in loaded.parameters())
    assert (loaded.spec, loaded.out_features) == (model.spec, model.out_features)
    assert torch.equal(outputs(loaded), outputs(model))


def test_unexpected_architecture_raises(working_directory: Path) -> None:
    save_run(Path("run"), encoder("resnet18"))
    torch.save(state_dict(), "theirs.pth")
    for path in ("run", "theirs.pth"):
        assert load_encoder(path, name="resnet18").spec.name == "resnet18"
        with pytest.raises(UserError, match=f"{path}: got a resnet18, expected a resnet50"):
            load_encoder(path, name="resnet50")
    with pytest.raises(UserError, match="encoder: got 'vit', expected resnet10"):
        import_weights("theirs.pth", name="vit")


# Other files


def test_all_pytorch_file_formats_load(working_directory: Path) -> None:
    state = state_dict()
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    torch.save(state, "zip.pth")
    torch.save(state, "pickles.pth.tar", _use_new_zipfile_serialization=False)  # the format of MoCo and VISSL
    save_file(state, "theirs.safetensors", {"format": "pt"})
    for path in ("zip.pth", "pickles.pth.tar", "theirs.safetensors"):
        assert torch.equal(outputs(import_weights(path)), outputs(model.eval())), path


def test_half_precision_and_missing_num_batches_tracked(working_directory: Path) -> None:
    state = {k: v.half() for k, v in state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, "half.pth")
    loaded = import_weights("half.pth")
    for name, value in loaded.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert (value.item(), value.dtype) == (0, torch.int64)
        else:
            assert torch.equal(value, state[name].float())


def test_timm_folder_gives_encoder_and_recipe(working_directory: Path) -> None:
    from timm.models import save_for_hf

    model = randomize_norms(timm.create_model("resnet18", num_classes=10))
    prepared = {"input_size": (3, 96, 96), "interpolation": "bilinear", "crop_pct": 0.9, "mean": (0.1, 0.2, 0.3)}
    model.pretrained_cfg.update(prepared | {"std": (0.4, 0.5, 0.6)})
    save_for_hf(model, "theirs", safe_serialization=True)
    opened = open_pretrained("theirs")
    h = timm.layers.SelectAdaptivePool2d(flatten=True)(model.forward_features(torch.ones(1, 3, 64, 64)))
    torch.testing.assert_close(opened.encoder(torch.ones(1, 3, 64, 64)), h)
    recipe = Augmentation(image_size=96, interpolation="bilinear", center_fraction=0.9, mean=(0.1, 0.2, 0.3))
    assert opened.augmentation == replace(recipe, std=(0.4, 0.5, 0.6))
    config = json.loads(Path("theirs/config.json").read_text())
    for changes, words in (
        (
            {"architecture": "vit_base_patch16_224"},
            "got tensors without cls_token.*expected those of timm/vit_base_patch16_224",
        ),
        ({"pretrained_cfg": {"interpolation": "lanczos"} | prepared}, "interpolation|std"),
        ({"pretrained_cfg": 5}, "missing or invalid parts"),
    ):
        Path("theirs/config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=words):
            load_encoder("theirs")


# What is refused


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def torchscript(path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but such files exist
        torch.jit.script(nn.Linear(1, 1)).save(path)


def run_without(part: str) -> None:
    path = save_run(Path("run"), encoder("resnet18")) / "checkpoints/last.pt"
    state = load_checkpoint(path)
    del state[part]
    write_checkpoint(state, path)


def run_with(**parts: Any) -> None:
    path = save_run(Path("run"), encoder("resnet18")) / "checkpoints/last.pt"
    write_checkpoint(load_checkpoint(path) | parts, path)


def save_folder(**changes: Any) -> None:
    """Save an exported folder whose config.json has these changes."""
    config = {"format": "fastsimclr", "encoder": asdict(EncoderSpec("resnet18")), "origin": ""}
    Path("folder").mkdir()
    Path("folder/config.json").write_text(json.dumps(config | changes))
    save_file(encoder("resnet18").state_dict(), "folder/model.safetensors")


@pytest.mark.parametrize(
    ("make", "path", "words"),
    [
        (lambda: None, "nowhere.pt", "no such file"),
        (lambda: Path("f.pt").mkdir(), "f.pt", "neither checkpoints/last.pt nor config.json and model.safetensors"),
        (lambda: Path("f.pt").write_bytes(b""), "f.pt", "damaged or not a checkpoint"),
        (lambda: Path("f.pt").write_text("weights"), "f.pt", "damaged or not a checkpoint"),
        (lambda: Path("f.pt").write_bytes(b"PK\x03\x04"), "f.pt", "damaged or not a checkpoint"),
        (lambda: Path("f.pt").write_bytes(random.Random(0).randbytes(999)), "f.pt", "damaged or not a checkpoint"),
        (lambda: Path("f.pt").write_bytes(b"\x93"), "f.pt", "damaged or not a checkpoint"),  # STACK_GLOBAL
        (lambda: Path("f.pt").write_bytes(b"c(Y\n$ \n"), "f.pt", "damaged or not a checkpoint"),  # GLOBAL
        (lambda: np.savez("f.npz", a=np.zeros(3)), "f.npz", "damaged or not a checkpoint"),
        (lambda: Path("f.onnx").write_bytes(b"\x08"), "f.onnx", "onnxruntime"),
        (lambda: Path("f.safetensors").write_bytes(b""), "f.safetensors", "not a safetensors file"),
        (lambda: Path("f.safetensors").write_bytes(b"\xff" * 99), "f.safetensors", "not a safetensors file"),
        (lambda: torchscript("f.pt"), "f.pt", "TorchScript"),
        (lambda: torch.save(nn.Sequential(nn.Linear(1, 1)), "f.pt"), "f.pt", "Sequential.*state_dict"),
        (lambda: torch.save(torchvision.models.resnet18(), "f.pt"), "f.pt", "torchvision.models.resnet.*state_dict"),
        (lambda: run_without("architecture"), "run", "got no architecture"),
        (lambda: run_without("model"), "run", "got no model"),
        (lambda: run_without("config"), "run", "got no config"),
        (lambda: run_with(model={}), "run", "model: got a dict, expected tensors by name"),
        (lambda: run_with(model=3), "run", "model: got 3"),
        (lambda: run_with(architecture="resnet18"), "run", "architecture: got 'resnet18'"),
        (
            lambda: run_with(architecture=make_state()["architecture"]),  # of a small stem
            "run",
            "conv1.weight",
        ),
        (lambda: run_with(config="data: ["), "run", r"config: got 'data: \[', expected"),
        (lambda: run_with(config="5"), "run", "config: got '5', expected"),
        (lambda: run_with(config="data: {flip_prob: 7}"), "run", "flip_prob: got 7"),
        (lambda: save_folder(encoder="resnet18"), "folder", "missing or invalid parts"),
        (lambda: save_folder(encoder={"name": "resnet18", "width": 5}), "folder", "conv1.weight"),
        (lambda: save_folder(encoder={"name": "resnet18", "channels": 5}), "folder", "conv1.weight"),
        (lambda: save_folder(encoder={"name": "resnet"}), "folder", "'resnet', expected one of resnet10"),
        (lambda: save_folder(encoder={"name": "module"}), "folder", "module of your own"),
        (lambda: save_folder(augmentation={"std": [0, 1, 1]}), "folder", "std: got"),
    ],
)
def test_invalid_file_is_one_line_error(
    make: Callable[[], object], path: str, words: str, working_directory: Path
) -> None:
    make()
    with pytest.raises(UserError, match=rf"(?s){path}.*got .*expected") as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)
    assert caught.match(words)


@pytest.mark.parametrize("kind", ["run", "zip", "pickles", "safetensors"])
@pytest.mark.slow
def test_truncated_file_raises(kind: str, working_directory: Path) -> None:
    save_run(Path("run"), encoder("resnet18"))
    torch.save(state_dict(), "zip")
    torch.save(state_dict(), "pickles", _use_new_zipfile_serialization=False)
    save_file(state_dict(), "f.safetensors")
    file = {"run": "run/checkpoints/last.pt", "safetensors": "f.safetensors"}.get(kind, kind)
    whole = Path(file).read_bytes()
    for keep in (0.0001, 0.3, 0.9, 0.9999):
        Path(file).write_bytes(whole)
        truncate(Path(file), keep)
        with pytest.raises(UserError, match="damaged"):
            load_encoder("run" if kind == "run" else file)


# Files that would run code


class Payload:
    """What pickle.load would execute."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


class EvalPayload:
    def __reduce__(self) -> Any:
        return eval, ("__import__('os').mkdir('executed')",)


def hidden_in_a_checkpoint(payload: object) -> dict[str, Any]:
    return {"state_dict": state_dict(), "hyper_parameters": {"config": [payload]}}


@pytest.mark.parametrize("payload", [Payload(), EvalPayload()])
@pytest.mark.parametrize("name", ["zip.pth", "pickles.pth", "protocol0.pkl", "protocol2.pkl", "protocol4.pkl", "run"])
def test_file_with_code_is_rejected_and_not_executed(payload: object, name: str, working_directory: Path) -> None:
    contents = hidden_in_a_checkpoint(payload)
    if name.startswith("protocol"):
        Path(name).write_bytes(pickle.dumps(payload, protocol=int(name[8])))
    elif name == "run":
        save_run(Path("run"), encoder("resnet18"))
        write_checkpoint(make_state(callbacks=[("Callback", contents)]), Path("run/checkpoints/last.pt"))
    else:
        torch.save(contents, name, _use_new_zipfile_serialization=name == "zip.pth")
    function = "posix.system" if isinstance(payload, Payload) else "builtins.eval"
    said = f"got a pickle that would import {function}.*loaded; expected tensors"
    if name == "run":
        said = "last.pt: got a file of other contents, expected a checkpoint of a fastsimclr run"
    with pytest.raises(UserError, match=f"{name}.*{said}"):
        load_encoder(name)
    assert not Path("executed").exists()
    if name.endswith(".pkl"):  # check that the payload works
        pickle.loads(Path(name).read_bytes())
        assert Path("executed").exists()


def payload_class(module: str, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """Return a class in this module whose unpickling creates the file `executed`."""

    class Config:
        def __init__(self) -> None:
            self.depth = 50

        def __setstate__(self, state: object) -> None:
            Path("executed").touch()

    Config.__module__, Config.__qualname__ = module, "Config"
    module_object = types.ModuleType(module)
    module_object.Config = Config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, module_object)
    package = module.split(".")[0]
    # Pickle imports the package before its module.
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    return Config


@pytest.mark.parametrize("new", [True, False])
def test_configuration_objects_are_ignored_and_not_instantiated(
    new: bool, working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {
        "opt": argparse.Namespace(depth=50, folder=PurePosixPath("x")),
        "config": payload_class("omegaconf.dictconfig", monkeypatch)(),
        "losses": [np.float64(1.5), np.arange(3)],
        "tasks": defaultdict(list, {1: [2]}),
        "types": (int, dict, list, object),
        "by_path": {PurePosixPath("x"): 1},
    }
    torch.save(others | {"state_dict": state_dict()}, "theirs.ckpt", _use_new_zipfile_serialization=new)
    assert import_weights("theirs.ckpt").spec.name == "resnet18"
    assert not Path("executed").exists()
    torch.load("theirs.ckpt", weights_only=False)  # check that the payload works
    assert Path("executed").exists()


def test_omegaconf_and_lightning_configurations_are_ignored(working_directory: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed")
    lightning = pytest.importorskip("pytorch_lightning.utilities.parsing", reason="Lightning is not installed")
    config = omegaconf.OmegaConf.create({"backbone": {"name": "resnet18", "sizes": [1, 2]}, "none": None})
    others = {"cfg": config, "hparams": lightning.AttributeDict(lr=0.1, folder=PurePosixPath("x"))}
    torch.save({"state_dict": state_dict(), "hyper_parameters": others}, "theirs.ckpt")
    assert import_weights("theirs.ckpt").spec.name == "resnet18"


def test_configuration_of_an_unlisted_module_is_rejected(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = payload_class("omegaconfig", monkeypatch)()  # shares a prefix with a listed module
    torch.save({"state_dict": state_dict(), "config": config}, "theirs.ckpt")
    with pytest.raises(UserError, match=r"would import omegaconfig\.Config"):
        import_weights("theirs.ckpt")
    assert not Path("executed").exists()


def test_safe_globals_are_restored_after_loading(working_directory: Path) -> None:
    torch.save({"state_dict": state_dict(), "opt": argparse.Namespace(a=1)}, "theirs.ckpt")
    before = torch.serialization.get_safe_globals()
    import_weights("theirs.ckpt")
    assert set(torch.serialization.get_safe_globals()) == set(before)
    with pytest.raises(UserError):
        load_checkpoint(Path("theirs.ckpt"))
