"""Read an encoder's tensors, and what is recorded about it, from a file: a run, an export, or another project's."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsimclr.checkpoint_format import has_checksum, is_checkpoint, load_checkpoint
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.errors import UserError
from fastsimclr.models import ENCODERS, EncoderSpec
from fastsimclr.pretrained.layouts import Weights, architecture_of, find_tensors, find_weights
from fastsimclr.pretrained.safe_pickle import read_foreign
from fastsimclr.run_folder import RunFolder

FOLDER_FILES = ("config.json", "model.safetensors")
"""The files of an exported folder, ours or timm's."""
FORMAT = "fastsimclr"
"""The format that the config.json of our exported folder names."""


@dataclass(frozen=True)
class Saved:
    """The contents of a file."""

    spec: EncoderSpec
    weights: Weights
    config: dict[str, Any] | None = None
    """The run's configuration, if recorded."""


def read(path: Path, name: str | None) -> Saved:
    """Read a file. name: how to build the encoder of a file that does not say so, if it is not a ResNet.

    Raises UserError if the file is missing, damaged, or holds no encoder.
    """
    import yaml  # here, like safetensors below: `import fastsimclr` needs only PyTorch and torchvision

    try:
        return _read(path, name)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, UserError) and str(path) in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: got a file with missing or invalid parts ({type(error).__name__}: {reason}), expected a whole one"
        ) from error


def _read(path: Path, name: str | None) -> Saved:
    if path.is_dir():
        run = RunFolder(path)
        newest, problems = run.newest_checkpoint()
        if newest is not None:
            for problem in problems:
                warnings.warn(f"{problem}; using {newest.path} instead", stacklevel=2)
            return _from_run(newest.state)
        if all((path / file).is_file() for file in FOLDER_FILES):
            return _from_folder(path, name)
        raise UserError(
            f"{path}: got a folder with neither {run.checkpoint.relative_to(path)} nor {' and '.join(FOLDER_FILES)}, "
            "expected a run's folder or an exported folder"
        )
    if not path.is_file():
        raise UserError(f"{path}: got no such file, expected a checkpoint or a run's folder")
    if path.suffix == ".onnx":
        raise UserError(
            f"{path}: got an ONNX graph, which only onnxruntime runs (onnxruntime.InferenceSession); expected weights: "
            "export the original checkpoint as safetensors"
        )
    if path.suffix == ".safetensors":
        return _from_weights(path, _read_safetensors(path), name)
    if has_checksum(path) or is_checkpoint(contents := read_foreign(path)):
        return _from_run(load_checkpoint(path))
    return _from_weights(path, contents, name)


def _from_run(state: dict[str, Any]) -> Saved:
    import yaml

    spec = EncoderSpec(**state["architecture"]["encoder"])
    prefix = "encoder." if spec.name in ENCODERS else "encoder.module."
    tensors = {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
    config = yaml.safe_load(state["config"])
    augmentation = Augmentation.from_options(config["data"])
    return Saved(spec, Weights(tensors, f"fastsimclr run, step {state['step']}", augmentation), config)


def _from_weights(path: Path, contents: Any, name: str | None) -> Saved:
    """Find the tensors of another project's checkpoint. Without a name, they must be a ResNet's."""
    try:
        if name is not None and name not in ENCODERS:
            return Saved(EncoderSpec(name), Weights(find_tensors(contents), f"a state dict of {name}"))
        weights = find_weights(contents)
        return Saved(architecture_of(weights.state), weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _from_folder(folder: Path, name: str | None) -> Saved:
    config_file, weights_file = (folder / file for file in FOLDER_FILES)
    config, tensors = json.loads(config_file.read_text()), _read_safetensors(weights_file)
    if config.get("format") != FORMAT:
        return _from_timm(config, tensors, name)
    recorded = config.get("augmentation")
    weights = Weights(
        tensors,
        config["origin"],
        Augmentation.from_options(recorded) if recorded is not None else None,
        stem_padding=config.get("stem_padding"),
        stem_relu=config.get("stem_relu", True),
    )
    return Saved(EncoderSpec(**config["encoder"]), weights, config.get("config"))


def _from_timm(config: dict[str, Any], tensors: dict[str, Tensor], name: str | None) -> Saved:
    architecture, prepared = config["architecture"], config["pretrained_cfg"]
    if architecture in ENCODERS and name != f"timm/{architecture}":
        weights = find_weights(tensors)
        spec = architecture_of(weights.state)
    else:
        weights = Weights(tensors, "")
        channels, image_size, _ = prepared.get("input_size", (3, 224, 224))
        spec = EncoderSpec(f"timm/{architecture}", image_size=image_size, channels=channels)
    augmentation = None
    if "mean" in prepared:  # missing in exports of checkpoints that do not record the preprocessing
        augmentation = Augmentation(
            image_size=prepared["input_size"][-1],
            mean=tuple(prepared["mean"]),
            std=tuple(prepared["std"]),
            center_fraction=prepared["crop_pct"],
            interpolation=prepared["interpolation"],
        )
    return Saved(spec, Weights(weights.state, str(config.get("origin", "timm")), augmentation))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: got a file that is damaged or not a safetensors file ({error}), expected a valid one"
        ) from error
