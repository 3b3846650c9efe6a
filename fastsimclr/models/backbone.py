"""Any nn.Module as an encoder, after a check of its output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def checkpoint_stages(encoder: Encoder | Backbone) -> None:
    """Turn on activation checkpointing: of each residual stage of our ResNets, or as a module's own
    `set_grad_checkpointing` does, which most models of timm have.

    Raises UserError for a module without it.
    """
    network: Any = encoder.module if isinstance(encoder, Backbone) else encoder
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # AssertionError: timm's, where a model does not support it
        raise UserError(
            f"--model.checkpoint_stages: got {encoder.spec.name}, expected resnet10 to resnet152, or a module with "
            "set_grad_checkpointing, as most of timm have: use --micro_batch_size instead"
        ) from error


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
    what = f"{encoder.spec.name} on images of {channels} x {image_size} x {image_size}"
    try:
        with torch.no_grad(), _in_eval_mode(encoder):
            h = _represent(encoder, {}, torch.zeros(2, channels, image_size, image_size))
    except Exception as error:  # of the user's code, or for a size that the encoder does not support
        raise UserError(
            f"encoder: got {what}, which fails: {describe_failure(error)}; expected an output (N, F) or (N, F, h, w)"
        ) from error
    if not isinstance(h, Tensor) or h.ndim != 2 or len(h) != 2 or not h.is_floating_point():
        got = f"shape {tuple(h.shape)} and {h.dtype}" if isinstance(h, Tensor) else f"type {type(h).__name__}"
        raise UserError(
            f"encoder: got {what} with output of {got}, expected floats (2, F) or (2, F, h, w) for 2 images"
        )
    return h.shape[1]


def unused_parameters(encoder: Encoder | Backbone) -> list[str]:
    """Return the names of the parameters that require a gradient and get none from the representations."""
    spec = encoder.spec
    parameters = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    if spec.name != USER_MODULE:
        parameters = {name: parameter.detach().to("meta").requires_grad_() for name, parameter in parameters.items()}
    with _in_eval_mode(encoder):
        h = _represent(encoder, parameters, torch.zeros(2, spec.channels, spec.image_size, spec.image_size))
    if not h.requires_grad:
        return list(parameters)
    gradients = torch.autograd.grad(h.sum(), list(parameters.values()), allow_unused=True)
    return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]


@contextmanager
def _in_eval_mode(encoder: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _represent(encoder: Encoder | Backbone, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return the representations, computed on the meta device for an encoder that is built by name."""
    weight = next(encoder.parameters(), images)
    if encoder.spec.name == USER_MODULE:
        with torch.random.fork_rng([weight.device] if weight.device.type == "cuda" else []):
            h: Tensor = encoder(images.to(weight.device, weight.dtype))
            return h
    state = {name: tensor.to("meta") for name, tensor in [*encoder.named_parameters(), *encoder.named_buffers()]}
    return torch.func.functional_call(encoder, state | parameters, images.to("meta", weight.dtype))
