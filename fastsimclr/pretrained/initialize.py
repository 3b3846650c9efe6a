"""Start an encoder from pretrained weights, or from fixed filters in its first layer."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from fastsimclr.errors import UserError
from fastsimclr.models import ENCODERS, Backbone, Encoder, EncoderSpec, build, cosine_filters
from fastsimclr.pretrained.layouts import State, without_prefix
from fastsimclr.pretrained.libraries import describe, network
from fastsimclr.pretrained.load import load_state
from fastsimclr.pretrained.published import load_published

IMAGENET, DCT = "imagenet", "dct"
COUNTER = ".num_batches_tracked"


def encoder(
    name: str,
    width: float = 1,
    stem: str = "auto",
    *,
    image_size: int = 224,
    channels: int = 3,
    weights: str | Path | None = None,
) -> Encoder | Backbone:
    """Build an encoder: images (N, channels, H, W) to representations h (N, encoder.out_features).

    name: "resnet10" (one block per stage), "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152"; "timm/NAME"
        or "torchvision/NAME" for any image backbone of timm or torchvision, without its classifier and with pooled
        features. `encoder_names` lists all names.
    width: width multiplier of our ResNets, applied to the channels of every layer; a multiple of 1/64 (1, 2 or 4 in
        the paper).
    stem: first layers of our ResNets: "imagenet" (7x7 convolution of stride 2, max-pooling), "medium" (5x5 convolution
        of stride 2, no pooling), "small" (3x3 convolution of stride 1, no pooling; for CIFAR), or "auto": "small" for
        images of up to 40 pixels, otherwise "imagenet".
    image_size: side of the images in pixels; used by stem "auto" and by encoders with position embeddings.
    channels: channels of the images.
    weights: weights to start from: "imagenet" for those that torchvision publishes (timm for timm/NAME), a file or
        run that `load_encoder` reads, or "dct", which sets only the first convolution of our ResNets, to cosine
        filters (docs/learning.md); None: random. Warns of what does not fit.

    encoder.spec holds these arguments. With width 1 and stem "imagenet" the state dict of our ResNets is torchvision's
    without `fc`.
    Raises ValueError for an unknown name or stem, an invalid width, images that the encoder does not support, and
    weights that cannot be read or of which less than half fits.
    """
    built = build(EncoderSpec(name, width, stem, image_size, channels))
    if weights is not None:
        for line in initialize(built, weights)[1:]:
            warnings.warn(line, stacklevel=2)
    return built


def initialize(encoder: nn.Module, weights: str | Path) -> list[str]:
    """Load pretrained weights into an encoder. Returns lines to print: what was loaded, then what did not fit.

    encoder: as built by `encoder` or `as_encoder`; on the CPU.
    weights: "imagenet", a file or run, or "dct", as for `encoder`.
    A first layer for other channels, and position embeddings for another image size are adapted.
    Raises UserError if the weights cannot be read or downloaded, or if less than half of the encoder's values fit.
    """
    if weights == DCT:
        return [_set_cosine_filters(encoder)]
    spec: EncoderSpec = encoder.spec  # type: ignore[assignment]
    model = network(encoder)
    expected = model.state_dict()
    state, origin = load_published(spec) if weights == IMAGENET else load_state(weights, spec)
    state = without_prefix(state, expected)
    fitting: State = {}
    adapted: list[str] = []
    misshaped: list[str] = []
    for name, value in state.items():
        if name not in expected:
            continue
        wanted = tuple(expected[name].shape)
        fitted, how = (value, "") if value.shape == wanted else _adapt(model, spec, name, value, wanted)
        if fitted.shape == wanted:
            fitting[name] = fitted
            adapted += [f"{name} {how}"] if how else []
        else:
            misshaped.append(f"{name} {tuple(value.shape)} instead of {wanted}")
    _check_half(weights, spec, fitting, expected)
    complete = model.state_dict()
    complete.update(fitting)  # in place: it also holds the versions of the modules
    model.load_state_dict(complete)

    missing = [name for name in expected if name not in state and not name.endswith(COUNTER)]
    unexpected = [name for name in state if name not in expected]
    differences = {
        "adapted": adapted,
        "left out, of another shape": misshaped,
        "left out, not in the encoder": unexpected,
        "random, not in the weights": missing,
    }
    lines = [f"weights: {len(fitting)} of {len(expected)} tensors from {origin}"]
    return lines + [f"weights: {what}: {', '.join(names)}" for what, names in differences.items() if names]


def _set_cosine_filters(encoder: nn.Module) -> str:
    if not isinstance(encoder, Encoder):
        which = describe(encoder.spec)  # type: ignore[arg-type]
        raise UserError(
            f"weights: got dct for {which}, expected it with {', '.join(ENCODERS)} only; for others use none"
        )
    weight = encoder.conv1.weight
    with torch.no_grad():
        weight.copy_(cosine_filters(weight.shape[0], weight.shape[1], weight.shape[2]))
    return f"weights: {len(weight)} cosine filters in conv1, and random ones elsewhere"


def _check_half(weights: str | Path, spec: EncoderSpec, fitting: State, expected: State) -> None:
    """Raise UserError if less than half of the encoder's values fit. Norms of another architecture fit by chance."""
    values, total = (sum(value.numel() for value in state.values()) for state in (fitting, expected))
    if 2 * values < total:
        wrong = next(name for name in expected if name not in fitting)
        raise UserError(
            f"weights: got {weights}, of which {values / total:.0%} of the values of {spec.name} fit (not {wrong}, for "
            "example); expected weights of the same architecture, width and stem"
        )


def _adapt(model: Any, spec: EncoderSpec, name: str, value: Tensor, wanted: tuple[int, ...]) -> tuple[Tensor, str]:
    """Adapt a tensor to other channels or another image size. Returns it and what was done, or as it is and ""."""
    outputs, channels, *kernel = value.shape if value.ndim == 4 else (0, 0)
    if (outputs, spec.channels, *kernel) == wanted:
        return adapt_channels(value, spec.channels), f"from {channels} to {spec.channels} channels by their mean"
    size = f"to images of {spec.image_size} pixels"
    if name == "pos_embed" and len(wanted) == value.ndim == 3 and hasattr(model, "patch_embed"):  # timm's
        from timm.layers import resample_abs_pos_embed

        height, width = model.patch_embed.grid_size
        others = wanted[1] - height * width  # of class tokens and the like
        if math.isqrt(max(0, value.shape[1] - others)) ** 2 == value.shape[1] - others:
            return resample_abs_pos_embed(value, (height, width), num_prefix_tokens=others), f"resampled {size}"
    if isinstance(model, VisionTransformer) and name == (key := "encoder.pos_embedding"):
        return interpolate_embeddings(model.image_size, model.patch_size, {key: value})[key], f"resampled {size}"
    return value, ""


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt the weight of a first convolution (O, C, h, w) to other channels: (O, channels, h, w).

    Each new channel gets the mean over the old ones, scaled by C / channels so that the sum over the channels, the
    response to a gray image, is kept. timm's adapt_input_conv repeats red, green and blue instead, with the same scale.
    """
    return weight.sum(1, keepdim=True).div(channels).expand(-1, channels, -1, -1)
