"""Encoders by name: the features of every family, their options, and the errors."""

import warnings
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from fastsimclr import encoder
from fastsimclr.errors import UserError
from fastsimclr.models import EncoderSpec, build, encoder_names

# timm's test models have the layers of their family, in small.
SMALL = [
    ("timm/test_vit", 64, 64),
    ("timm/test_convnext", 32, 64),
    ("timm/test_efficientnet", 32, 256),
    ("timm/test_nfnet", 32, 192),
    ("torchvision/mobilenet_v3_small", 32, 576),
    ("torchvision/shufflenet_v2_x0_5", 32, 1024),
    ("torchvision/squeezenet1_1", 32, 512),
    ("torchvision/mnasnet0_5", 32, 1280),
]
LARGE = [
    ("timm/swin_tiny_patch4_window7_224", 32, 768),
    ("timm/maxvit_rmlp_pico_rw_256", 64, 256),
    ("torchvision/alexnet", 64, 256),
    ("torchvision/convnext_tiny", 32, 768),
    ("torchvision/densenet121", 32, 1024),
    ("torchvision/efficientnet_b0", 32, 1280),
    ("torchvision/googlenet", 32, 1024),
    ("torchvision/inception_v3", 80, 2048),
    ("torchvision/maxvit_t", 224, 512),
    ("torchvision/regnet_y_400mf", 32, 440),
    ("torchvision/swin_v2_t", 32, 768),
    ("torchvision/vgg11_bn", 32, 512),
    ("torchvision/vit_b_16", 32, 768),
]


@pytest.mark.parametrize(
    ("name", "image_size", "features"), [*SMALL, *(pytest.param(*each, marks=pytest.mark.slow) for each in LARGE)]
)
def test_features_of_five_channels_and_gradients_of_all_parameters(name: str, image_size: int, features: int) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = encoder(name, image_size=image_size, channels=5)
    assert made.out_features == features
    assert made.training
    h = made(torch.randn(2, 5, image_size, image_size))
    assert h.shape == (2, features)
    assert h.isfinite().all()
    h.square().sum().backward()
    assert [path for path, parameter in made.named_parameters() if parameter.grad is None] == []


def test_spec_builds_the_same_architecture() -> None:
    made = encoder("timm/test_vit", image_size=48, channels=2)
    assert made.spec == EncoderSpec("timm/test_vit", image_size=48, channels=2)
    build(made.spec).load_state_dict(made.state_dict())
    assert made.fixed_size
    assert not encoder("timm/test_convnext", image_size=48).fixed_size


def test_torchvision_features_are_those_before_the_classifier() -> None:
    """ConvNeXt's classifier begins with the norm of the features."""
    ours, theirs = encoder("torchvision/convnext_tiny", image_size=32), torchvision.models.convnext_tiny()
    missing = theirs.load_state_dict(ours.module.state_dict(), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["classifier.2.weight", "classifier.2.bias"], [])
    theirs.classifier[2] = nn.Identity()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=0, atol=0)


def test_other_channels_keep_the_settings_and_the_scale_of_the_first_convolution() -> None:
    ours, theirs = encoder("torchvision/shufflenet_v2_x0_5", channels=6), torchvision.models.shufflenet_v2_x0_5()
    assert isinstance(first := ours.module.conv1[0], nn.Conv2d)
    assert (first.in_channels, first.stride, first.padding, first.bias) == (6, (2, 2), (1, 1), None)
    assert first.weight.detach().std() == pytest.approx(theirs.conv1[0].weight.detach().std().item(), rel=0.1)


def test_nothing_is_downloaded_and_the_names_cover_both_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    encoder("timm/test_vit.r160_in1k", image_size=32)  # the name of published weights
    names = encoder_names()
    assert len(names) == len(set(names)) == 6 + len(timm.list_models()) + 80
    assert {"resnet18", "timm/vit_tiny_patch16_224", "torchvision/vit_b_16"} <= set(names)
    assert "torchvision/raft_large" not in names


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, r"got 'resnet19', expected one of resnet10, resnet18, .*; the nearest are resnet18, "),
        ("vit_b_16", {}, "the nearest are torchvision/vit_b_16"),
        ("timm/vit_tiny_patch16_244", {}, "the nearest are timm/vit_tiny_patch16_224, "),
        (
            "torchvision/efficientnet_b",
            {},
            "the nearest are torchvision/efficientnet_b0, torchvision/efficientnet_b1, ",
        ),
        ("torchvision/fasterrcnn_resnet50_fpn", {}, "is no image classifier of torchvision"),
        ("torchvision/raft_small", {}, "is no image classifier of torchvision"),
        ("torchvision/r3d_18", {}, "is no image classifier of torchvision"),
        ("torchvision/quantized_resnet18", {}, "is no image classifier of torchvision"),
        ("timm/hf-hub:user/model", {}, "is no image classifier of timm"),
        ("timm/test_vit", {"width": 2}, r"got 2, auto for timm/test_vit; expected 1, auto"),
        ("torchvision/maxvit_t", {"image_size": 64}, "for images of 3 x 64 x 64, which fails: ValueError: Input size"),
        ("torchvision/squeezenet1_1", {"image_size": 8}, "on images of 3 x 8 x 8, which fails: RuntimeError"),
    ],
)
def test_errors_are_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        encoder(name, **options)
    assert "\n" not in str(raised.value)
