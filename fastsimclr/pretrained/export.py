"""Export an encoder for other libraries: torchvision, safetensors, ONNX or timm."""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import nn

from fastsimclr.data.transform import Transform
from fastsimclr.errors import UserError
from fastsimclr.models import STANDARD_ENCODERS, USER_MODULE, Encoder
from fastsimclr.pretrained.files import FOLDER_FILES, FORMAT
from fastsimclr.pretrained.libraries import describe, network, tensors, torchvision_code
from fastsimclr.pretrained.load import Pretrained, open_checkpoint
from fastsimclr.pretrained.model_card import model_card
from fastsimclr.pretrained.onnx_graph import write_graph
from fastsimclr.run_folder import RunFolder, check_output, rename_atomically

MODEL_CARD = "README.md"


def export(options: argparse.Namespace) -> str:
    """Write the encoder and return the summary line to print."""
    form, output = FORMATS[options.format], Path(options.output)
    if form.suffixes and output.suffix not in form.suffixes:
        raise UserError(f"--output: got {output}, expected a file name that ends in {' or '.join(form.suffixes)}")
    check_output(output, options.force, is_folder=not form.suffixes)
    source = options.checkpoint
    pretrained = open_checkpoint(source, options.encoder)
    if output.exists() and any(
        file.exists() and file.samefile(output) for file in (Path(source), RunFolder(source).checkpoint)
    ):
        raise UserError(f"--output: got {output}, which is --checkpoint itself; give another name")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # In the same file system, so that the output is replaced atomically.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as partial:
            hint = form.write(pretrained, Path(partial, output.name), options)
            size = sum(file.stat().st_size for file in Path(partial).rglob("*") if file.is_file())
            _put(Path(partial), output)
    except OSError as error:
        raise UserError(f"--output: got {output}, which cannot be written ({error.strerror or error})") from error
    spec, transform = pretrained.encoder.spec, cast(Transform | None, pretrained.encoder.transform)
    images = "prepare images as in training; the checkpoint does not record how"
    if transform is not None:
        kind = str(transform.pixels.dtype).removeprefix("torch.")
        images = f"prepare an image ({spec.channels}, H, W) {kind} by\n{transform.code()}"
    return (
        f"{output}: {describe(spec)} of {source} ({pretrained.origin}) for {options.format}, "
        f"{size / 2**20:.1f} MiB; load it with `{hint}`; {images}"
    )


def _put(partial: Path, output: Path) -> None:
    """Move the written files to their place: a new folder in one rename, else file by file, the output itself last."""
    written = partial / output.name
    if written.is_dir() and not output.exists():
        os.rename(written, output)
        return
    # Other files of an existing folder are kept.
    folder, target = (written, output) if written.is_dir() else (partial, output.parent)
    for file in sorted(folder.iterdir(), key=lambda file: file == written):
        rename_atomically(file, target / file.name)


# The formats. Each function writes `file` and returns the code that loads it from `options.output`, its final path.


def write_torchvision(pretrained: Pretrained, file: Path, options: argparse.Namespace) -> str:
    """Write a state dict for torchvision's model of this name. The returned code also removes its classifier."""
    encoder = pretrained.encoder
    code = torchvision_code(encoder)
    if code is None:
        raise _no_such_model("torchvision", pretrained)
    _refuse_unusual_stem(pretrained, "torchvision")
    torch.save(tensors(encoder), file)
    return f"{code}; model.load_state_dict(torch.load({options.output!r}, weights_only=True))"


def write_safetensors(pretrained: Pretrained, file: Path, options: argparse.Namespace) -> str:
    """Write a folder for load_encoder and the Hugging Face Hub.

    It holds the tensors by the names of the encoder's library, how the encoder is built, how its images are prepared,
    and a model card.
    """
    encoder = pretrained.encoder
    config: dict[str, Any] = {"format": FORMAT, "encoder": asdict(encoder.spec), "origin": pretrained.origin}
    if isinstance(encoder, Encoder):
        config |= {"stem_padding": encoder.conv1.padding[0], "stem_relu": isinstance(encoder.relu, nn.ReLU)}
    if pretrained.augmentation is not None:
        config["augmentation"] = asdict(pretrained.augmentation)
    if pretrained.config is not None:
        config["config"] = _without_folders(pretrained.config)
    _write_folder(file, config, pretrained)
    (file / MODEL_CARD).write_text(model_card(pretrained, RunFolder.of(options.checkpoint)))
    module = ", encoder=MODULE" if encoder.spec.name == USER_MODULE else ""
    return f"encoder = fastsimclr.load_encoder({options.output!r}{module})"


def write_timm(pretrained: Pretrained, file: Path, options: argparse.Namespace) -> str:
    """Write a folder with the files that timm itself would write for the model."""
    encoder, augmentation = pretrained.encoder, pretrained.augmentation
    spec = encoder.spec
    arguments: dict[str, Any] = {}
    about: dict[str, Any]
    if isinstance(encoder, Encoder):
        if (spec.width, spec.stem, spec.channels) != (1, "imagenet", 3) or spec.name not in STANDARD_ENCODERS:
            raise _no_such_model("timm", pretrained)
        _refuse_unusual_stem(pretrained, "timm")
        architecture, about = spec.name, {"first_conv": "conv1", "classifier": "fc"}
    elif spec.name.startswith("timm/"):
        theirs: Any = network(encoder).pretrained_cfg  # type: ignore[assignment]
        architecture, about = theirs["architecture"], {name: theirs[name] for name in ("first_conv", "classifier")}
        if encoder.fixed_size:
            arguments["img_size"] = spec.image_size
        if spec.channels != 3:
            arguments["in_chans"] = spec.channels
            about["first_conv"] = None  # otherwise timm adapts the weights from 3 channels
    else:
        raise _no_such_model("timm", pretrained)
    prepared: dict[str, Any] = {}
    if augmentation is not None:
        side, fraction = augmentation.image_size, augmentation.center_fraction
        prepared = {"input_size": [spec.channels, side, side], "interpolation": augmentation.interpolation}
        prepared |= {"crop_pct": fraction, "crop_mode": "center"}
        mean, std = augmentation.statistics
        prepared |= {"mean": list(mean), "std": list(std)}
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.out_features,
        "model_args": arguments,
        "origin": pretrained.origin,
        "pretrained_cfg": {"num_classes": 0, "custom_load": False, "fixed_input_size": False, **about, **prepared},
    }
    _write_folder(file, config, pretrained)
    return f"model = timm.create_model({f'local-dir:{options.output}'!r}, pretrained=True, num_classes=0)"


def write_onnx(pretrained: Pretrained, file: Path, options: argparse.Namespace) -> str:
    """Write a graph from `images` (batch, C, height, width) to `representation` (batch, features).

    Raises RuntimeError, and leaves no file, if onnxruntime's representations differ from PyTorch's.
    """
    shape = write_graph(pretrained, file)
    return (
        f"session = onnxruntime.InferenceSession({options.output!r}); "
        f"h, = session.run(None, {{'images': images}})  # images: {shape} float32"
    )


class Format(NamedTuple):
    """An export format: its writer, and the suffixes of its file names (none: a folder)."""

    write: Callable[[Pretrained, Path, argparse.Namespace], str]
    suffixes: tuple[str, ...]


FORMATS = {
    "torchvision": Format(write_torchvision, (".pt", ".pth")),
    "safetensors": Format(write_safetensors, ()),
    "onnx": Format(write_onnx, (".onnx",)),
    "timm": Format(write_timm, ()),
}


# Helpers of the formats


def _write_folder(folder: Path, config: dict[str, Any], pretrained: Pretrained) -> None:
    config_file, weights_file = (folder / name for name in FOLDER_FILES)
    folder.mkdir()
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors(pretrained.encoder), weights_file, {"format": "pt"})


def _without_folders(value: Any) -> Any:
    """A configuration with absolute paths shortened to the last name, because the folder may be published."""
    if isinstance(value, dict):
        return {name: _without_folders(each) for name, each in value.items()}
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _no_such_model(form: str, pretrained: Pretrained) -> UserError:
    spec = pretrained.encoder.spec
    possible = ["safetensors", "onnx"]
    if form != "torchvision" and torchvision_code(pretrained.encoder) is not None:
        possible.insert(0, "torchvision")
    if form != "timm" and spec.name.startswith("timm/"):
        possible.insert(0, "timm")
    return UserError(
        f"--format: got {form} for {describe(spec)}, for which {form} has no equivalent; expected "
        f"{', '.join(possible[:-1])} or {possible[-1]}"
    )


def _refuse_unusual_stem(pretrained: Pretrained, form: str) -> None:
    """Raise UserError for a ResNet's stem whose padding or activation the format cannot express."""
    encoder = pretrained.encoder
    if not isinstance(encoder, Encoder):
        return
    padding = encoder.conv1.kernel_size[0] // 2
    if encoder.conv1.padding != (padding, padding) or not isinstance(encoder.relu, nn.ReLU):
        what = "no ReLU" if not isinstance(encoder.relu, nn.ReLU) else f"a padding of {encoder.conv1.padding[0]}"
        raise UserError(
            f"--format: got {form} for an encoder with {what} in its stem, which {form} cannot express; expected "
            "safetensors or onnx"
        )
