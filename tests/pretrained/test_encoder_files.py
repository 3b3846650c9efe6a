"""Encoders of timm and torchvision and a user's module: loading and exporting."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from weights import images, randomize_norms, save_run

import fastsimclr
from fastsimclr import UserError, encoder, import_weights, load_encoder
from fastsimclr.export import main
from fastsimclr.models import EncoderSpec, as_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 64


class Net(nn.Module):
    """A user's module: feature maps of images of 5 channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(5, width, 3, stride=2), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 16, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.norm(self.first(images)).relu())


def save(name: str, channels: int = 3) -> nn.Module:
    """Save an encoder in the run folder `run` and return it. name "net": a user's module, of 5 channels."""
    torch.manual_seed(0)
    if name == "net":
        made = as_encoder(Net(), image_size=SIDE, channels=5)
    else:
        made = encoder(name, image_size=SIDE, channels=channels)
    save_run(Path("run"), randomize_norms(made), f"--data.image_size={SIDE}")
    return made


def features(module: nn.Module, channels: int = 3) -> Tensor:
    with torch.no_grad():
        return module(images(2, channels, SIDE, SIDE))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("timm/vit_tiny_patch16_224", 3),
        ("timm/convnext_atto", 5),
        ("timm/test_vit_relpos", 3),  # has buffers outside its state dict
        ("torchvision/efficientnet_b0", 3),
        ("torchvision/mobilenet_v3_small", 1),
    ],
)
@pytest.mark.slow
def test_run_and_export_restore_the_encoder(name: str, channels: int, working_directory: Path) -> None:
    made = save(name, channels)
    assert main(["--checkpoint=run", "--format=safetensors", "--output=exported"]) == 0
    before = torch.get_rng_state()
    for path in ("run", "exported"):
        loaded = load_encoder(path, name)
        assert torch.equal(features(loaded, channels), features(made, channels))
        assert loaded.spec == made.spec
        assert loaded.out_features == made.out_features
        assert loaded.transform.image_size == SIDE
        assert not any(module.training for module in loaded.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_users_module_is_filled(working_directory: Path) -> None:
    made = save("net")
    module = Net()
    loaded = load_encoder("run", encoder=module)
    assert loaded.module is module
    assert loaded.spec == EncoderSpec("module", image_size=SIDE, channels=5)
    assert not module.training
    assert torch.equal(features(loaded, 5), features(made, 5))


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (lambda: load_encoder("net"), "net: got weights of a module of your own, expected an instance of it"),
        (
            lambda: load_encoder("net", encoder=Net(width=4)),
            r"net: got first.weight of shape \(8, 5, 3, 3\), expected \(4, 5, 3, 3\) of a module of your own",
        ),
        (
            lambda: load_encoder("net", encoder=nn.Sequential(Net())),
            "net: got tensors without 0.first.weight, .* expected those of a module of your own",
        ),
        (
            lambda: load_encoder("vit", encoder=Net()),
            "vit: got weights of timm/test_vit, expected no module for them: it is built by its name",
        ),
        (lambda: load_encoder("vit", "timm/test_vit2"), "vit: got a timm/test_vit, expected a timm/test_vit2"),
        (lambda: load_encoder("vit", "resnet50"), "vit: got a timm/test_vit, expected a resnet50"),
        (
            lambda: encoder("timm/test_convnext", weights="vit"),
            "vit: got weights of timm/test_vit, expected those of timm/test_convnext",
        ),
        (lambda: import_weights("vit.pth"), "vit.pth: got tensors named cls_token.*expected a ResNet's.*or the name"),
        (lambda: import_weights("vit.pth", "timm/test_vit2"), "vit.pth: got tensors without reg_token.*timm/test_vit2"),
        (lambda: import_weights("vit.pth", "timm/vit_tini"), "vit.pth: encoder: got 'timm/vit_tini'.* nearest"),
        (lambda: import_weights("vit.pth", "timm"), "encoder: got 'timm', expected resnet10"),
    ],
)
def test_refused_in_one_line(load: Callable[[], Any], words: str, working_directory: Path) -> None:
    save("net")
    Path("run").rename("net")
    torch.save(save("timm/test_vit").module.state_dict(), "vit.pth")
    Path("run").rename("vit")
    with pytest.raises(UserError, match=words) as caught:
        load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("timm/test_vit", lambda: timm.create_model("test_vit", img_size=224, num_classes=7)),
        ("timm/test_convnext", lambda: timm.create_model("test_convnext", num_classes=7)),
        ("torchvision/mobilenet_v3_small", lambda: torchvision.models.mobilenet_v3_small(num_classes=7)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_state_dict_of_a_library_loses_its_classifier(
    name: str, make: Callable[[], nn.Module], prefix: str, working_directory: Path
) -> None:
    theirs = randomize_norms(make())
    torch.save({"state_dict": {f"module.{prefix}{key}": value for key, value in theirs.state_dict().items()}}, "w.pth")
    loaded = import_weights("w.pth", name)
    assert loaded.transform is None
    for key, value in loaded.module.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])


# Export


CODE = {
    "timm/test_vit": {"timm"},
    "timm/test_convnext": {"timm"},
    "torchvision/mobilenet_v3_small": {"torchvision"},
    "torchvision/vit_b_16": {"torchvision"},
    "torchvision/convnext_tiny": {"torchvision"},
    "torchvision/vgg11": set(),
}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.slow
def test_library_loads_the_export_with_equal_features(
    name: str, working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = save(name)
    for form, output in (("timm", "folder"), ("torchvision", "e.pt")):
        code = main(["--checkpoint=run", f"--format={form}", f"--output={output}"])
        said = capsys.readouterr()
        if form in CODE[name]:
            assert code == 0
            (hint,) = re.findall("`(.+)`", said.out)
            variables = {"torch": torch, "torchvision": torchvision, "timm": timm}
            exec(hint, variables)
            assert torch.equal(features(variables["model"].eval()).flatten(1), features(made))
        else:
            assert code == 2
            possible = ", ".join([*CODE[name], "safetensors"])
            assert f"got {form} for {name}, for which {form} has no equivalent; expected {possible} or onnx" in said.err


@pytest.mark.slow
def test_timm_loads_an_export_of_five_channels(working_directory: Path) -> None:
    made = save("timm/test_convnext", channels=5)
    assert main(["--checkpoint=run", "--format=timm", "--output=folder"]) == 0
    theirs = timm.create_model("local-dir:folder", pretrained=True, num_classes=0).eval()
    assert torch.equal(features(theirs, 5), features(made, 5))
    assert torch.equal(features(load_encoder("folder"), 5), features(made, 5))


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("timm/test_vit", 5, (SIDE, SIDE)), ("torchvision/mobilenet_v3_small", 3, ("height", "width"))],
)
@pytest.mark.slow
def test_onnx_of_any_encoder(name: str, channels: int, size: tuple[Any, ...], working_directory: Path) -> None:
    made = save(name, channels)
    assert main(["--checkpoint=run", "--format=onnx", "--output=e.onnx"]) == 0
    session = onnxruntime.InferenceSession("e.onnx")
    assert session.get_inputs()[0].shape == ["batch", channels, *size]
    (h,) = session.run(None, {"images": images(2, channels, SIDE, SIDE).numpy()})
    torch.testing.assert_close(torch.from_numpy(h), features(made, channels), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_users_module_is_exported_as_safetensors_and_onnx(
    working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = save("net")
    assert main(["--checkpoint=run", "--format=safetensors", "--output=folder"]) == 2
    assert "--encoder FILE.py:FUNCTION" in capsys.readouterr().err
    Path("file_of_a_user.py").write_text(f"from {__name__} import Net")
    option = "--encoder=file_of_a_user.py:Net"
    for form, output in (("safetensors", "folder"), ("onnx", "e.onnx")):
        assert main(["--checkpoint=run", f"--format={form}", f"--output={output}", option]) == 0
    assert "load_encoder('folder', encoder=MODULE)" in capsys.readouterr().out
    assert "encoder=MODULE" in Path("folder/README.md").read_text()
    assert torch.equal(features(fastsimclr.load_encoder("folder", encoder=Net()), 5), features(made, 5))
    (h,) = onnxruntime.InferenceSession("e.onnx").run(None, {"images": images(2, 5, SIDE, SIDE).numpy()})
    torch.testing.assert_close(torch.from_numpy(h), features(made, 5), rtol=0, atol=1e-4)
