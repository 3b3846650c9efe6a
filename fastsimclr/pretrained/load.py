"""Load an encoder from a checkpoint of any supported project."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.transform import Transform
from fastsimclr.errors import UserError
from fastsimclr.models import ENCODERS, Encoder, EncoderSpec, resnet
from fastsimclr.pretrained.layouts import Architecture, Weights, architecture_of, check_fits, find_weights
from fastsimclr.pretrained.safe_pickle import read_foreign
from fastsimclr.run_folder import RunFolder, is_checkpoint

TIMM_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class Pretrained:
    """An encoder, and what its file records about it."""

    encoder: Encoder
    """In eval mode, float32, on the CPU."""
    augmentation: Augmentation | None
    """The augmentation it was trained with, if recorded."""
    origin: str
    """The project or run that wrote the file."""
    config: dict[str, Any] | None = None
    """The run's configuration, if recorded."""


def load_encoder(path: str | Path, name: str | None = None) -> Encoder:
    """Load the encoder of a file: normalized images (N, 3, H, W) to representations h (N, encoder.out_features).

    encoder.transform prepares an image as in evaluation: h = encoder(encoder.transform(image)[None]). It is None if the
    file does not record how its images were prepared.

    path: a run's folder or checkpoint, an export (torchvision, safetensors, timm), or a checkpoint that import_weights
        supports.
    name: the expected architecture, such as "resnet50"; None accepts any.
    The encoder is in eval mode, in float32, on the CPU. Never runs code from the file. Raises UserError, a ValueError,
    if the file is missing or damaged, or does not hold a supported ResNet of this name.
    """
    return open_pretrained(path, name).encoder


def import_weights(path: str | Path, name: str | None = None) -> Encoder:
    """Load the encoder of another project's PyTorch checkpoint. Arguments and result as for `load_encoder`.

    Supported: VISSL; lightly; solo-learn; MoCo and MoCo v3; SupContrast; google-research's SimCLR, converted by
    tonylins/simclr-converter (widths 1, 2, 4), and SimCLRv2, converted by Separius/SimCLRv2-Pytorch (without selective
    kernels); torchvision and timm; and any file with one ResNet by torchvision's names. The names of the tensors
    identify the layout (layouts.py).

    Prepare images as the project does. Only for google-research's checkpoints is this known: images in [0, 1], without
    mean and std, as `open_pretrained(path).augmentation` returns.
    """
    return load_encoder(path, name)


def open_pretrained(path: str | Path, name: str | None = None) -> Pretrained:
    """Load the encoder of a file, with what the file records about it. Arguments and errors as for `load_encoder`."""
    if name is not None and name not in ENCODERS:
        raise UserError(f"name: got {name!r}, expected one of {', '.join(ENCODERS)}")
    import yaml  # here, like safetensors below: `import fastsimclr` needs only PyTorch and torchvision

    path = Path(path)
    try:
        opened = _open(path)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: got a file with missing or invalid parts ({type(error).__name__}: {reason}), expected a whole one"
        ) from error
    if name not in (None, opened.encoder.name):
        raise UserError(f"{path}: got a {opened.encoder.name}, expected a {name}")
    if opened.augmentation is not None:
        opened.encoder.transform = Transform.from_augmentation(opened.augmentation)
    return opened


# Files


def _open(path: Path) -> Pretrained:
    if path.is_dir():
        run = RunFolder(path)
        if run.checkpoint.is_file():
            return _open(run.checkpoint)
        if all((path / file).is_file() for file in TIMM_FILES):
            return _from_timm(path)
        raise UserError(
            f"{path}: got a folder with neither {run.checkpoint.relative_to(path)} nor {' and '.join(TIMM_FILES)}, "
            "expected a run's folder or a timm folder"
        )
    if not path.is_file():
        raise UserError(f"{path}: got no such file, expected a checkpoint or a run's folder")
    if path.suffix == ".onnx":
        raise UserError(
            f"{path}: got an ONNX graph, which only onnxruntime runs (onnxruntime.InferenceSession); expected weights: "
            "export the original checkpoint as safetensors"
        )
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    contents = read_foreign(path)
    return _from_run(path, contents) if is_checkpoint(contents) else _from_weights(path, contents)


def _from_run(path: Path, state: dict[str, Any]) -> Pretrained:
    import yaml

    built, prefix = state["architecture"]["encoder"], "encoder."
    tensors = {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
    config = yaml.safe_load(state["config"])
    augmentation = Augmentation.from_options(config["data"])
    model = _build(path, Architecture(built["name"], built["width"], built["stem"]), Weights(tensors, ""))
    return Pretrained(model, augmentation, f"fastsimclr run, step {state['step']}", config)


def _from_weights(path: Path, contents: Any) -> Pretrained:
    """Load a state dict of any layout; its shapes determine the architecture."""
    try:
        weights = find_weights(contents)
        architecture = architecture_of(weights.state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Pretrained(_build(path, architecture, weights), weights.augmentation, weights.origin)


def _from_safetensors(path: Path) -> Pretrained:
    """Load an export of ours, described by its header, or any other file as a state dict."""
    tensors, header = _read_safetensors(path)
    if header.get("format") != "fastsimclr":
        return _from_weights(path, tensors)
    architecture = Architecture(header["encoder"], float(header["width"]), header["stem"])
    padding, relu = int(header["stem_padding"]), header["stem_relu"] == "true"
    model = _build(path, architecture, Weights(tensors, "", stem_padding=padding, stem_relu=relu))
    augmentation = Augmentation.from_options(json.loads(header["augmentation"])) if "augmentation" in header else None
    config = json.loads(header["config"]) if "config" in header else None
    return Pretrained(model, augmentation, header["origin"], config)


def _from_timm(folder: Path) -> Pretrained:
    config_file, weights_file = (folder / name for name in TIMM_FILES)
    config = json.loads(config_file.read_text())
    name, prepared = config["architecture"], config["pretrained_cfg"]
    if name not in ENCODERS:
        raise UserError(f"{config_file}: got the architecture {name}, expected one of {', '.join(ENCODERS)}")
    opened = _from_weights(folder, _read_safetensors(weights_file)[0])
    augmentation = None
    if "mean" in prepared:  # missing in exports of checkpoints that do not record the preprocessing
        augmentation = Augmentation(
            image_size=prepared["input_size"][-1],
            mean=tuple(prepared["mean"]),
            std=tuple(prepared["std"]),
            center_fraction=prepared["crop_pct"],
            interpolation=prepared["interpolation"],
        )
    return Pretrained(opened.encoder, augmentation, str(config.get("origin", "timm")))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: got a file that is damaged or not a safetensors file ({error}), expected a valid one"
        ) from error


# The encoder


def _build(path: Path, architecture: Architecture, weights: Weights) -> Encoder:
    """Build the encoder with these weights, without changing the random state."""
    try:
        with torch.device("meta"):
            model = resnet(EncoderSpec(*architecture))
        check_fits(weights.state, model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    model.to_empty(device="cpu")
    # Files from before PyTorch 0.4.1 have no num_batches_tracked.
    counters = {name: torch.zeros(()) for name in model.state_dict() if name.endswith(".num_batches_tracked")}
    model.load_state_dict(counters | weights.state)
    if weights.stem_padding is not None:
        model.conv1.padding = (weights.stem_padding, weights.stem_padding)
    if not weights.stem_relu:
        model.relu = nn.Identity()  # type: ignore[assignment]
    return model.eval()
