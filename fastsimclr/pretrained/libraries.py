"""The models of timm and torchvision that correspond to our encoders, and how an encoder is named in messages."""

from typing import Any

import torch
from torch import Tensor, nn

from fastsimclr.models import STANDARD_ENCODERS, USER_MODULE, Backbone, Encoder, EncoderSpec, torchvision_options


def network(encoder: nn.Module) -> nn.Module:
    """The model of the encoder's library, or the user's module: its state dict has their names."""
    return encoder.module if isinstance(encoder, Backbone) else encoder


def tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """A copy of the encoder's state dict by the names of its library, on the CPU."""
    state = network(encoder).state_dict()
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def describe(spec: EncoderSpec) -> str:
    """Name an encoder in messages, such as "resnet50 of width 2 with the small stem for 5 channels"."""
    if spec.name == USER_MODULE:
        return "a module of your own"
    width = f" of width {spec.width:g}" if spec.width != 1 else ""
    stem = f" with the {spec.stem} stem" if spec.stem != "imagenet" else ""
    return f"{spec.name}{width}{stem}" + (f" for {spec.channels} channels" if spec.channels != 3 else "")


def classifier_name(encoder: Encoder | Backbone) -> str:
    """The name of the classifier in the library's model; "fc" if that is not one linear layer, or there is none."""
    library, _, model = encoder.spec.name.partition("/")
    name: Any = "fc"
    if library == "timm":
        name = network(encoder).pretrained_cfg["classifier"]  # type: ignore[index]
    elif library == "torchvision":
        from torchvision import models

        with torch.device("meta"):
            whole = models.get_model(model, weights=None, **torchvision_options(model, encoder.spec.image_size))
        head = _head(whole)
        linear = [path for path, layer in getattr(whole, head).named_modules() if isinstance(layer, nn.Linear)]
        name = f"{head}.{linear[0]}".removesuffix(".") if len(linear) == 1 else "fc"
    return name if isinstance(name, str) else "fc"  # some models of timm have several


def torchvision_code(encoder: Encoder | Backbone) -> str | None:
    """Code that builds torchvision's model without its classifier as `model`, which loads the encoder's state dict.

    None if torchvision has no such model.
    """
    spec = encoder.spec
    name, options = spec.name.removeprefix("torchvision/"), ""
    if spec.width != 1 or spec.channels != 3:
        return None
    if isinstance(encoder, Encoder):
        if name not in STANDARD_ENCODERS:
            return None
        rest = "model.fc = torch.nn.Identity()"
        if spec.stem != "imagenet":
            conv = encoder.conv1
            size, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
            arguments = f"3, {conv.out_channels}, {size}, {stride}, {padding}, bias=False"
            rest += f"; model.conv1 = torch.nn.Conv2d({arguments}); model.maxpool = torch.nn.Identity()"
    else:
        module = network(encoder)
        kept = getattr(module, _head(module)) if name != spec.name else None
        if not isinstance(kept, nn.Sequential):  # VGG and AlexNet, whose pooling differs, and other libraries
            return None
        options = "".join(f", {key}={value!r}" for key, value in torchvision_options(name, spec.image_size).items())
        head = f"model.{_head(module)}"
        rest = f"{head} = {head}[:{len(kept)}]" if len(kept) else f"{head} = torch.nn.Identity()"
    return f"model = torchvision.models.get_model({name!r}{options}); {rest}"


def _head(model: nn.Module) -> str:
    """The name of the classifier of a torchvision model."""
    return next(name for name in ("fc", "classifier", "head", "heads") if hasattr(model, name))
