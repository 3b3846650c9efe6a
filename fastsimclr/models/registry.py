"""Encoders by name: ours, timm's and torchvision's."""

import difflib
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastsimclr.errors import UserError
from fastsimclr.imports import describe_failure
from fastsimclr.models.backbone import Backbone
from fastsimclr.models.resnet import ENCODERS, Encoder, resnet
from fastsimclr.models.spec import USER_MODULE, EncoderSpec


def build(spec: EncoderSpec) -> Encoder | Backbone:
    """Build the encoder of a spec, whose stem may be "auto", with random weights. Downloads nothing.

    Raises UserError for an unknown name or stem, an invalid width, images that the encoder does not support, and a
    user's module.
    """
    name, image_size, channels = spec.name, spec.image_size, spec.channels
    if name == USER_MODULE:
        raise UserError("encoder: got weights of a module of your own, expected encoder=MODULE to load them into")
    library, _, model = name.partition("/")
    if library not in _LIBRARIES or not model:
        if name not in ENCODERS:
            raise UserError(
                f"encoder: got {name!r}, expected one of {', '.join(ENCODERS)}, timm/NAME or torchvision/NAME; "
                f"the nearest are {nearest_encoders(name)}"
            )
        return resnet(spec)
    if spec.width != 1 or spec.stem not in ("auto", "imagenet"):
        raise UserError(
            f"width, stem: got {spec.width:g}, {spec.stem} for {name}; expected 1, auto: only our ResNets have others"
        )
    names, build_module = _LIBRARIES[library]
    if model.partition(".")[0] not in names():
        raise UserError(
            f"encoder: got {name!r}, which is no image classifier of {library}; "
            f"the nearest are {nearest_encoders(name, library)}"
        )
    try:
        module, fixed_size = build_module(model, image_size, channels)
    except Exception as error:  # of a library, for a size or number of channels that the model does not support
        size = f"{channels} x {image_size} x {image_size}"
        raise UserError(f"encoder: got {name} for images of {size}, which fails: {describe_failure(error)}") from error
    spec = EncoderSpec(name, image_size=image_size, channels=channels)
    return Backbone(module, spec, fixed_size=fixed_size)


def encoder_names() -> list[str]:
    """Return the name of every encoder: of ours, and of timm (if it is installed) and torchvision."""
    libraries = {library: names for library, (names, _) in _LIBRARIES.items()}
    if importlib.util.find_spec("timm") is None:
        del libraries["timm"]
    return [*ENCODERS, *(f"{library}/{name}" for library, names in libraries.items() for name in names())]


def nearest_encoders(name: str, library: str = "") -> str:
    """Return the three names nearest to `name`, which may lack its library; of one library, or of all."""
    names = [f"{library}/{each}" for each in _LIBRARIES[library][0]()] if library else encoder_names()
    by_model = {full.rpartition("/")[2]: full for full in reversed(names)}
    model = name.rpartition("/")[2]
    completed = [each for each in reversed(by_model) if model and each.startswith(model)][:3]
    return ", ".join(by_model[each] for each in completed or difflib.get_close_matches(model, by_model, 3, cutoff=0))


def _timm_names() -> list[str]:
    try:
        import timm
    except ImportError as error:
        raise UserError("encoder: got timm/NAME, but timm is not installed: pip install timm") from error
    return timm.list_models()


def _timm(name: str, image_size: int, channels: int) -> tuple[nn.Module, bool]:
    """Return a model of timm without its classifier, and whether its weights depend on the size of the images."""
    return create_timm(name, image_size, num_classes=0, in_chans=channels)


def create_timm(name: str, image_size: int, **options: Any) -> tuple[nn.Module, bool]:
    """Create a model of timm, with more options of `timm.create_model`, and return whether its weights depend on the
    size of the images."""
    import timm

    try:
        return timm.create_model(name, img_size=image_size, **options), True
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **options), False


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)  # without detection, segmentation, video, optical flow and quantization


def _torchvision(name: str, image_size: int, channels: int) -> tuple[nn.Module, bool]:
    """Return a model of torchvision without its classifier, and whether its weights depend on the size of the images.

    Kept are the layers of a classifier before its first linear one: pooling, normalization, flattening.
    """
    from torchvision import models

    options = torchvision_options(name, image_size)
    model = models.get_model(name, weights=None, **options)
    if isinstance(model, models.SqueezeNet):  # its classifier is a convolution, and its features are maps
        model.classifier = nn.AdaptiveAvgPool2d(1)
    elif isinstance(model, models.AlexNet | models.VGG):  # whose pooling leaves 6x6 or 7x7 positions
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Identity()
    else:
        (head,) = (each for each in ("fc", "classifier", "head", "heads") if hasattr(model, each))
        setattr(model, head, nn.Sequential(*itertools.takewhile(_is_kept, getattr(model, head).children())))
    if channels != 3:
        _set_channels(model, channels)
    return model, "image_size" in options or "input_size" in options


def torchvision_options(name: str, image_size: int) -> dict[str, Any]:
    """Return the arguments with which torchvision's model of this name is built as an encoder."""
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name.startswith("maxvit_"):
        return {"input_size": (image_size, image_size)}
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}


def _is_kept(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Linear | nn.Dropout)


def _set_channels(model: nn.Module, channels: int) -> None:
    """Give the first convolution `channels` input channels, with weights of the same standard deviation."""
    conv = next(each for each in model.modules() if isinstance(each, nn.Conv2d))
    weight = torch.randn(conv.out_channels, channels, *conv.kernel_size) * conv.weight.detach().std()
    conv.in_channels, conv.weight = channels, nn.Parameter(weight)


_LIBRARIES: dict[str, tuple[Callable[[], list[str]], Callable[[str, int, int], tuple[nn.Module, bool]]]] = {
    "timm": (_timm_names, _timm),
    "torchvision": (_torchvision_names, _torchvision),
}
"""The names of a library's image classifiers, and the function that builds one without its classifier."""
