"""A user's module as an encoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastsimclr import encoder
from fastsimclr.errors import UserError
from fastsimclr.models import as_encoder, import_module, unused_parameters


class Returns(nn.Module):
    """A module with the output of a function; it has no parameters."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        return self.function(images)


def small_module() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU())


@pytest.mark.parametrize(("function", "features"), [(lambda x: x.mean((2, 3)), 3), (lambda x: x.repeat(1, 2, 1, 1), 6)])
def test_vectors_and_maps_of_a_module_without_parameters(function: Callable[[Tensor], Tensor], features: int) -> None:
    made = as_encoder(Returns(function), image_size=8, channels=3)
    images = torch.randn(5, 3, 8, 8)
    assert made.out_features == features
    torch.testing.assert_close(made(images), images.mean((2, 3)).repeat(1, features // 3))


def test_the_check_changes_nothing() -> None:
    module = small_module()
    module[1].eval()  # a frozen norm in a training module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random_state = torch.get_rng_state()
    made = as_encoder(module, image_size=8, channels=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert [part.training for part in module] == [True, False, True, True]
    assert made.module is module
    assert as_encoder(made, image_size=16, channels=3) is made


@pytest.mark.parametrize("place", [{"device": "meta"}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}])
def test_modules_of_other_devices_and_dtypes(place: dict[str, Any]) -> None:
    module = small_module().to(**place)
    assert as_encoder(module, image_size=8, channels=3).out_features == 6
    assert next(module.parameters()).device.type == place.get("device", "cpu")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.flatten(2), r"output of shape \(2, 3, 64\) and torch.float32, expected floats \(2, F\) or"),
        (lambda x: (x, x), "output of type tuple"),
        (lambda x: {"features": x}, "output of type dict"),
        (lambda x: x[:1].flatten(1), r"output of shape \(1, 192\)"),
        (lambda x: x.flatten(1).argsort(), "and torch.int64"),
        (lambda x: x @ torch.zeros(3, 3), "which fails: RuntimeError: mat1 and mat2"),
        (lambda x: x.missing, "which fails: AttributeError"),
    ],
)
def test_other_outputs_and_failures_are_one_line(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(UserError, match=f"encoder: got module on images of 3 x 8 x 8.* {message}") as raised:
        as_encoder(Returns(function), image_size=8, channels=3)
    assert "\n" not in str(raised.value)


def test_an_encoder_by_name_must_fit_the_images() -> None:
    vit = encoder("timm/vit_tiny_patch16_224", image_size=32)
    with pytest.raises(
        UserError, match=r"got timm/vit_tiny_patch16_224 on images of 3 x 48 x 48, which fails: AssertionError"
    ):
        as_encoder(vit, image_size=48, channels=3)
    with pytest.raises(UserError, match=r"got resnet18 on images of 4 x 32 x 32, which fails"):
        as_encoder(encoder("resnet18"), image_size=32, channels=4)


def test_unused_parameters() -> None:
    module = small_module()
    module.extra, module.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    module.forward = lambda images: module[0](images)  # type: ignore[method-assign]
    expected = ["module.1.weight", "module.1.bias", "module.extra.weight", "module.extra.bias"]
    assert unused_parameters(as_encoder(module, image_size=8, channels=3)) == expected
    assert unused_parameters(encoder("timm/test_vit", image_size=32)) == []
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_module_by_reference(tmp_path: Path) -> None:
    file = tmp_path / "modules_by_reference.py"
    file.write_text(
        "from torch import nn\n"
        "class Net(nn.Flatten): pass\n"
        "def make(): return Net()\n"
        "net = Net()\n"
        "def needs(width): return Net()\n"
        "number = 3\n"
        "def wrong(): return [1]\n"
    )
    for name in ("Net", "make", "net"):
        assert type(import_module(f"{file}:{name}")).__name__ == "Net"
    for name, message in (("needs", "which fails: TypeError"), ("number", "a int"), ("wrong", "a list, expected")):
        with pytest.raises(UserError, match=f"encoder: got .*:{name}, {message}"):
            import_module(f"{file}:{name}")
