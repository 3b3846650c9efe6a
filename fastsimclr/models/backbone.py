"""Any nn.Module as an encoder, after a check of its output."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsimclr.errors import UserError
from fastsimclr.imports import describe_failure, import_object
from fastsimclr.models.resnet import Encoder
from fastsimclr.models.spec import USER_MODULE, EncoderSpec


class Backbone(nn.Module):
    """Any image backbone as an encoder: images (N, C, H, W) to representations h (N, out_features).

    module: returns features (N, F), or feature maps (N, F, h, w), which are averaged over h and w.
    fixed_size: whether the shapes of its weights depend on the size of the images.
    Raises UserError if the module fails on images of its spec, or returns something else.
    """

    def __init__(self, module: nn.Module, spec: EncoderSpec, *, fixed_size: bool = False) -> None:
        super().__init__()
        self.module, self.spec, self.fixed_size = module, spec, fixed_size
        self.transform: Callable[[Any], Tensor] | None = None
        self.out_features = count_features(self, spec.image_size, spec.channels)

    def forward(self, images: Tensor) -> Tensor:
        h: Tensor = self.module(images)
        return h.mean((2, 3)) if isinstance(h, Tensor) and h.ndim == 4 else h


def as_encoder(module: nn.Module, *, image_size: int, channels: int) -> Encoder | Backbone:
    """Return a user's module as an encoder. An encoder built by `encoder` is returned as it is.

    The module's weights, random state and training flags do not change.
    Raises UserError unless it maps images (N, channels, image_size, image_size) to (N, F) or (N, F, h, w).
    """
    if not isinstance(module, Encoder | Backbone):
        return Backbone(module, EncoderSpec(USER_MODULE, image_size=image_size, channels=channels))
    if (module.spec.image_size, module.spec.channels) != (image_size, channels):
        count_features(module, image_size, channels)
    return module


def import_module(reference: str) -> nn.Module:
    """Return the module of a reference such as `mymodel.py:make_encoder`: a class, a function or an instance.

    A class or function is called without arguments. Raises UserError if that fails or gives no nn.Module.
    """
    found = import_object(reference)
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise UserError(f"encoder: got {reference}, which fails: {describe_failure(error)}") from error
    if not isinstance(found, nn.Module):
        raise UserError(
            f"encoder: got {reference}, a {type(found).__name__}, expected an nn.Module or a function of one"
        )
    return found


def count_features(encoder: Encoder | Backbone, image_size: int, channels: int) -> int:
    """Return the number of features F of the representations (N, F), from a forward pass of two black images.

    Encoders that are built by name run on the meta device, which computes only shapes; a user's module, which may
    contain operations without shapes there, runs where it is.
    Raises UserError if the pass fails, or for another output.
    """
    name, images = encoder.spec.name, torch.zeros(2, channels, image_size, image_size)
    what = f"{name} on images of {channels} x {image_size} x {image_size}"
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad():
            h = _on_device(encoder, images) if name == USER_MODULE else _on_meta(encoder, images)
    except Exception as error:  # of the user's code, or for a size that the encoder does not support
        raise UserError(
            f"encoder: got {what}, which fails: {describe_failure(error)}; expected an output (N, F) or (N, F, h, w)"
        ) from error
    finally:
        for module, flag in training.items():
            module.training = flag
    if not isinstance(h, Tensor) or h.ndim != 2 or len(h) != 2 or not h.is_floating_point():
        got = f"shape {tuple(h.shape)} and {h.dtype}" if isinstance(h, Tensor) else f"type {type(h).__name__}"
        raise UserError(
            f"encoder: got {what} with output of {got}, expected floats (2, F) or (2, F, h, w) for 2 images"
        )
    return h.shape[1]


def _on_device(encoder: nn.Module, images: Tensor) -> Any:
    weight = next(encoder.parameters(), images)
    gpus = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        return encoder(images.to(weight.device, weight.dtype))


def _on_meta(encoder: nn.Module, images: Tensor) -> Any:
    tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
    state = {name: tensor.to("meta", torch.float32) if tensor.is_floating_point() else tensor.to("meta")
             for name, tensor in tensors}  # fmt: skip
    return torch.func.functional_call(encoder, state, images.to("meta"))
