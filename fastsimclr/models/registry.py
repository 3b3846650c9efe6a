"""Encoders by name: ours, timm's and torchvision's; and any nn.Module as an encoder."""

import inspect
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fastsimclr.errors import UserError
from fastsimclr.models.resnet import ENCODERS, Encoder, resnet
from fastsimclr.models.spec import USER_MODULE, EncoderSpec


class Backbone(nn.Module):
    """Any image backbone as an encoder: images (N, C, H, W) to representations h (N, out_features).

    module: returns features (N, F), or feature maps (N, F, h, w), which are averaged over h and w.
    """

    def __init__(self, module: nn.Module, spec: EncoderSpec) -> None:
        super().__init__()
        self.module, self.spec = module, spec
        self.transform: Callable[[Any], Tensor] | None = None
        self.out_features = _probe(self)

    def forward(self, images: Tensor) -> Tensor:
        h: Tensor = self.module(images)
        return h.mean((2, 3)) if h.ndim == 4 else h


def encoder(
    name: str,
    width: float = 1,
    stem: str = "auto",
    *,
    image_size: int = 224,
    channels: int = 3,
) -> Encoder | Backbone:
    """Build an encoder: images (N, channels, H, W) to representations h (N, encoder.out_features).

    name: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152"; "timm/NAME" or "torchvision/NAME" for any
        image backbone of timm or torchvision, without its classifier.
    width: width multiplier of our ResNets, applied to the channels of every layer; a multiple of 1/64 (1, 2 or 4 in
        the paper).
    stem: first layers of our ResNets: "imagenet" (7x7 convolution of stride 2, max-pooling), "small" (3x3 convolution
        of stride 1, no pooling; for CIFAR), or "auto": "small" for images of up to 64 pixels, otherwise "imagenet".
    image_size: side of the images in pixels; used by stem "auto" and by encoders with position embeddings.
    channels: channels of the images.

    encoder.spec holds these arguments. The weights are randomly initialized. With width 1 and stem "imagenet" the state
    dict of our ResNets is torchvision's without `fc`.
    Raises ValueError for an unknown name or stem or an invalid width.
    """
    library, _, model = name.partition("/")
    if model and library in _LIBRARIES:
        spec = EncoderSpec(name, image_size=image_size, channels=channels)
        return Backbone(_LIBRARIES[library](model, image_size, channels), spec)
    if name not in ENCODERS:
        raise UserError(f"encoder: got {name!r}, expected {', '.join(ENCODERS)}, timm/NAME or torchvision/NAME")
    return resnet(EncoderSpec(name, width, stem, image_size, channels))


def as_encoder(module: nn.Module, *, image_size: int, channels: int) -> nn.Module:
    """Return a user's module as an encoder. An encoder built by `encoder` is returned as it is.

    Raises UserError unless it maps images (N, channels, image_size, image_size) to (N, F) or (N, F, h, w).
    """
    if isinstance(module, Encoder | Backbone):
        return module
    return Backbone(module, EncoderSpec(USER_MODULE, image_size=image_size, channels=channels))


def build(spec: EncoderSpec) -> Encoder | Backbone:
    """Build the encoder of a spec. Raises UserError if only the user can build it."""
    if spec.name == USER_MODULE:
        raise UserError("encoder: got weights of a module of your own, expected encoder=MODULE to load them into")
    return encoder(**asdict(spec))


def _timm(name: str, image_size: int, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"encoder: got timm/{name}, but timm is not installed; pip install timm") from error
    try:
        try:
            return timm.create_model(name, num_classes=0, in_chans=channels, img_size=image_size)
        except TypeError:  # an encoder for images of any size
            return timm.create_model(name, num_classes=0, in_chans=channels)
    except RuntimeError as error:
        raise UserError(f"encoder: got timm/{name} ({error}), expected a name of timm.list_models()") from error


def _torchvision(name: str, image_size: int, channels: int) -> nn.Module:
    from torchvision import models

    try:
        builder = models.get_model_builder(name)
    except ValueError as error:
        raise UserError(f"encoder: got torchvision/{name} ({error}), expected a name of its list_models()") from error
    options = {"image_size": image_size} if "image_size" in inspect.signature(builder).parameters else {}
    model = builder(weights=None, **options)
    for path in ("fc", "classifier", "head", "heads.head"):
        parent, _, last = path.rpartition(".")
        owner = getattr(model, parent, None) if parent else model
        if owner is not None and hasattr(owner, last):
            setattr(owner, last, nn.Identity())
    return model


_LIBRARIES: dict[str, Callable[[str, int, int], nn.Module]] = {"timm": _timm, "torchvision": _torchvision}


def _probe(backbone: Backbone) -> int:
    """Return the number of features, from a forward pass of two images. Raises UserError for another output."""
    spec, module = backbone.spec, backbone.module
    reference = next(module.parameters(), torch.empty(0))
    images = torch.zeros(2, spec.channels, spec.image_size, spec.image_size, device=reference.device)
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            h = backbone(images.to(reference.dtype))
    except RuntimeError as error:
        raise UserError(
            f"encoder: got {spec.name}, which fails on images {tuple(images.shape)} "
            f"({str(error).splitlines()[0]}); expected (N, F) or (N, F, h, w)"
        ) from error
    finally:
        module.train(training)
    if not isinstance(h, Tensor) or h.ndim != 2 or len(h) != 2:
        got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise UserError(f"encoder: got {spec.name} with output {got}, expected (2, F) or (2, F, h, w) for 2 images")
    return h.shape[1]
