"""Load an encoder from a checkpoint of any supported project."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.pixels import format_of
from fastsimclr.data.transform import Transform
from fastsimclr.errors import UserError
from fastsimclr.imports import is_object_reference
from fastsimclr.models import ENCODERS, USER_MODULE, Backbone, Encoder, EncoderSpec, as_encoder, build, import_module
from fastsimclr.pretrained.files import Saved, read
from fastsimclr.pretrained.hub import SCHEME, download
from fastsimclr.pretrained.layouts import check_shapes, select
from fastsimclr.pretrained.libraries import describe, network

LIBRARIES = ("timm/", "torchvision/")


@dataclass(frozen=True)
class Pretrained:
    """An encoder, and what its file records about it."""

    encoder: Encoder | Backbone
    """In eval mode, float32, on the CPU."""
    augmentation: Augmentation | None
    """The augmentation it was trained with, if recorded."""
    origin: str
    """The project or run that wrote the file."""
    config: dict[str, Any] | None = None
    """The run's configuration, if recorded."""


def load_encoder(path: str | Path, name: str | None = None, *, encoder: nn.Module | None = None) -> Encoder | Backbone:
    """Load the encoder of a file: normalized images (N, C, H, W) to representations h (N, encoder.out_features).

    encoder.transform prepares an image as in evaluation: h = encoder(encoder.transform(image)[None]). It is None if the
    file does not record how its images were prepared. encoder.spec says how the encoder is built.

    path: a run's folder or checkpoint, an export (torchvision, safetensors, timm), "hf://USER/NAME" or
        "hf://USER/NAME@REVISION" for an export on the Hugging Face Hub, or a checkpoint that import_weights supports.
    name: the expected architecture, such as "resnet50" or "timm/vit_tiny_patch16_224"; None accepts any. A state dict
        that is not a ResNet's needs it.
    encoder: an instance to load the weights into, which are replaced. Needed for those of a module of your own.
    The encoder is in eval mode, in float32, on the CPU. Never runs code from the file. Raises UserError, a ValueError,
    if the file is missing or damaged, or does not hold an encoder of this name.
    """
    return open_pretrained(path, name, encoder=encoder).encoder


def import_weights(path: str | Path, name: str | None = None) -> Encoder | Backbone:
    """Load the encoder of another project's PyTorch checkpoint. Arguments and result as for `load_encoder`.

    Supported ResNets: VISSL; lightly; solo-learn; MoCo and MoCo v3; SupContrast; google-research's SimCLR, converted by
    tonylins/simclr-converter (widths 1, 2, 4), and SimCLRv2, converted by Separius/SimCLRv2-Pytorch (without selective
    kernels); torchvision and timm; and any file with one ResNet by torchvision's names. The names of the tensors
    identify the layout (layouts.py). With name="timm/NAME" or "torchvision/NAME": a state dict of that model, also
    under a prefix such as "backbone."; its classifier is dropped.

    Prepare images as the project does. Only for google-research's checkpoints is this known: images in [0, 1], without
    mean and std, as `open_pretrained(path).augmentation` returns.
    """
    return load_encoder(path, name)


def open_pretrained(path: str | Path, name: str | None = None, *, encoder: nn.Module | None = None) -> Pretrained:
    """Load the encoder of a file, with what the file records about it. Arguments and errors as for `load_encoder`."""
    if name is not None and name not in ENCODERS and not name.startswith(LIBRARIES):
        raise UserError(f"encoder: got {name!r}, expected {', '.join(ENCODERS)}, timm/NAME or torchvision/NAME")
    saved = _read(path, name if encoder is None else USER_MODULE)
    if name not in (None, saved.spec.name):
        raise UserError(f"{path}: got a {saved.spec.name}, expected a {name}")
    try:
        model = _build(saved.spec, encoder)
        state = _matching(saved, model)
        check_shapes(state, network(model).state_dict(), describe(saved.spec))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    complete = network(model).state_dict()  # it also holds the versions of the modules
    # Files from before PyTorch 0.4.1 have no num_batches_tracked.
    complete.update({name: torch.zeros(()) for name in complete if name.endswith(".num_batches_tracked")})
    complete.update(state)
    network(model).load_state_dict(complete)
    if saved.weights.stem_padding is not None:
        model.conv1.padding = (saved.weights.stem_padding, saved.weights.stem_padding)  # type: ignore[union-attr,assignment]
    if not saved.weights.stem_relu:
        model.relu = nn.Identity()  # type: ignore[assignment]
    augmentation = saved.weights.augmentation
    if augmentation is not None:
        pixels = format_of(PixelOptions.from_config((saved.config or {}).get("data", {})))
        model.transform = Transform.from_augmentation(augmentation, pixels)
    return Pretrained(model.float().cpu().eval(), augmentation, saved.weights.origin, saved.config)


def open_checkpoint(path: str, encoder: str | None) -> Pretrained:
    """Load the encoder of the options --checkpoint and --encoder: its expected name, or a reference to a module."""
    if encoder is not None and is_object_reference(encoder):
        return open_pretrained(path, encoder=import_module(encoder))
    return open_pretrained(path, encoder)


def load_state(path: str | Path, spec: EncoderSpec) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a file, by their names in the encoder's library, and the file's origin.

    path: as for `load_encoder`. The width, stem, channels and image size may differ from the spec's, and of other
    encoders than our ResNets also the names, which may have a prefix. Raises UserError for another encoder.
    """
    saved = _read(path, None if spec.name in ENCODERS else spec.name)
    if saved.spec.name != spec.name:
        raise UserError(f"{path}: got weights of {describe(saved.spec)}, expected those of {describe(spec)}")
    weights = saved.weights
    if weights.stem_padding is not None or not weights.stem_relu:
        raise UserError(f"{path}: got an unusual stem of {weights.origin}, expected the stem of {describe(spec)}")
    return weights.state, weights.origin


def _read(path: str | Path, name: str | None) -> Saved:
    is_remote = str(path).startswith(SCHEME)
    return read(download(str(path)) if is_remote else Path(path), name)


def _build(spec: EncoderSpec, module: nn.Module | None = None) -> Encoder | Backbone:
    """Build the encoder without changing the random state. module: one to return instead, which must be of the spec."""
    if isinstance(module, Encoder | Backbone) and module.spec == spec:
        return module
    if spec.name == USER_MODULE:
        if module is None:
            raise UserError(
                "got weights of a module of your own, expected an instance of it to load them into: "
                "load_encoder(path, encoder=MODULE), or --encoder FILE.py:FUNCTION"
            )
        return as_encoder(module, image_size=spec.image_size, channels=spec.channels)
    if module is not None:
        raise UserError(f"got weights of {describe(spec)}, expected no module for them: it is built by its name")
    if spec.name in ENCODERS:
        with torch.device("meta"):  # without initialization: ResNets have no tensors outside their state dict
            model = build(spec)
        return model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        return build(spec)


def _matching(saved: Saved, encoder: nn.Module) -> dict[str, Tensor]:
    """The tensors of the encoder among those of the file. Raises UserError for other names."""
    return select(saved.weights.state, network(encoder).state_dict(), describe(saved.spec))
