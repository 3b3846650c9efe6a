"""Export an encoder for other libraries: torchvision, safetensors, ONNX or timm."""

import argparse
import contextlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.transform import Transform
from fastsimclr.errors import UserError
from fastsimclr.models import Encoder
from fastsimclr.pretrained.files import FOLDER_FILES, FORMAT
from fastsimclr.pretrained.load import Pretrained, open_pretrained
from fastsimclr.run_folder import RunFolder, check_new, rename_atomically

OPSET = 18  # ONNX opset, from 2022
TOLERANCE = 1e-4  # maximum error of a representation, relative to its largest element if that is above 1
LARGEST_PROTOBUF = 2**31 - 2**20  # bytes; a larger ONNX model keeps its weights in a separate file
DEFAULT_IMAGE_SIZE = {"imagenet": 224, "small": 32}  # by stem, where the training size is not known


def export(options: argparse.Namespace) -> str:
    """Write the encoder and return the summary line to print."""
    form, source, output = FORMATS[options.format], Path(options.checkpoint), Path(options.output)
    if form.suffixes and output.suffix not in form.suffixes:
        raise UserError(f"--output: got {output}, expected a file name that ends in {' or '.join(form.suffixes)}")
    check_new(output, options.force)
    if output.exists() and output.is_dir() == bool(form.suffixes):
        raise UserError(
            f"--output: got {output}, expected a {'file' if form.suffixes else 'folder'}; give another name"
        )
    pretrained = open_pretrained(source)
    if output.exists() and any(
        file.exists() and file.samefile(output) for file in (source, RunFolder(source).checkpoint)
    ):
        raise UserError(f"--output: got {output}, which is --checkpoint itself; give another name")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # In the same file system, so that the output is replaced atomically.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as partial:
            hint = form.write(pretrained, Path(partial, output.name), output)
            size = sum(file.stat().st_size for file in Path(partial).rglob("*") if file.is_file())
            _put(Path(partial), output)
    except OSError as error:
        raise UserError(f"--output: got {output}, which cannot be written ({error.strerror or error})") from error
    encoder, augmentation = pretrained.encoder, pretrained.augmentation
    width = f" of width {encoder.spec.width}" if encoder.spec.width != 1 else ""
    images = "prepare images as in training; the checkpoint does not record how"
    if augmentation is not None:
        images = f"prepare an image (3, H, W) uint8 by\n{Transform.from_augmentation(augmentation).code()}"
    return (
        f"{output}: {encoder.spec.name}{width} of {source} ({pretrained.origin}) for {options.format}, "
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


# The formats. Each function writes `file` and returns the code that loads it from `output`, its final path.


def write_torchvision(pretrained: Pretrained, file: Path, output: Path) -> str:
    """Write a state dict for torchvision's ResNet without fc. The returned code also replaces the stem, if small."""
    encoder = pretrained.encoder
    if encoder.spec.width != 1:
        raise UserError(
            f"--format: got torchvision for an encoder of width {encoder.spec.width}, which torchvision does not have; "
            "expected safetensors or onnx"
        )
    _refuse_unusual_stem(encoder, "torchvision")
    torch.save(_tensors(encoder), file)
    small = (
        f"model.conv1 = {_conv1(encoder)}; model.maxpool = torch.nn.Identity(); "
        if encoder.spec.stem == "small"
        else ""
    )
    return (
        f"model = torchvision.models.{encoder.spec.name}(); model.fc = torch.nn.Identity(); {small}"
        f"model.load_state_dict(torch.load({str(output)!r}, weights_only=True))"
    )


def write_safetensors(pretrained: Pretrained, file: Path, output: Path) -> str:
    """Write a folder for load_encoder: the tensors, how the encoder is built, and the preparation of its images."""
    encoder = pretrained.encoder
    config = {"format": FORMAT, "encoder": asdict(encoder.spec), "origin": pretrained.origin}
    if isinstance(encoder, Encoder):
        config |= {"stem_padding": encoder.conv1.padding[0], "stem_relu": isinstance(encoder.relu, nn.ReLU)}
    if pretrained.augmentation is not None:
        config["augmentation"] = asdict(pretrained.augmentation)
    if pretrained.config is not None:
        config["config"] = pretrained.config
    _write_folder(file, config, _tensors(encoder))
    return f"encoder = fastsimclr.load_encoder({str(output)!r})"


def write_timm(pretrained: Pretrained, file: Path, output: Path) -> str:
    """Write a folder with the files that timm itself would write for the model."""
    encoder, augmentation = pretrained.encoder, pretrained.augmentation
    if encoder.spec.width != 1 or encoder.spec.stem != "imagenet":
        what = (
            f"the small stem of {encoder.spec.name}"
            if encoder.spec.width == 1
            else f"an encoder of width {encoder.spec.width}"
        )
        raise UserError(f"--format: got timm for {what}, which timm does not have; expected safetensors or onnx")
    _refuse_unusual_stem(encoder, "timm")
    prepared: dict[str, Any] = {}
    if augmentation is not None:
        side, fraction = augmentation.image_size, augmentation.center_fraction
        prepared = {"input_size": [3, side, side], "interpolation": augmentation.interpolation, "crop_pct": fraction}
        prepared |= {"crop_mode": "center", "mean": list(augmentation.mean), "std": list(augmentation.std)}
    config = {
        "architecture": encoder.spec.name,
        "num_classes": 0,
        "num_features": encoder.out_features,
        "global_pool": "avg",
        "origin": pretrained.origin,
        "pretrained_cfg": {
            "num_classes": 0,
            "custom_load": False,
            "fixed_input_size": False,
            "first_conv": "conv1",
            "classifier": "fc",
            **prepared,
        },
    }
    _write_folder(file, config, _tensors(encoder))
    return f"model = timm.create_model({f'local-dir:{output}'!r}, pretrained=True, num_classes=0)"


def write_onnx(pretrained: Pretrained, file: Path, output: Path) -> str:
    """Write a graph from `images` (batch, 3, height, width) to `representation` (batch, features).

    Batch, height and width are dynamic. Raises RuntimeError, and leaves no file, if onnxruntime's representations
    differ from PyTorch's.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format: got onnx, but {error.name} is not installed; pip install 'fastsimclr[onnx]'"
        ) from error
    encoder, augmentation = pretrained.encoder, pretrained.augmentation
    side = augmentation.image_size if augmentation is not None else DEFAULT_IMAGE_SIZE[encoder.spec.stem]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # from inside the exporter
        program = torch.onnx.export(
            encoder,
            (torch.zeros(2, 3, side, side),),
            dynamo=True,
            input_names=["images"],
            output_names=["representation"],
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(_about(pretrained))
    if augmentation is not None:
        program.model.metadata_props.update({k: json.dumps(v) for k, v in _preparation(augmentation).items()})
    weights = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    program.save(file, external_data=weights > LARGEST_PROTOBUF)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    compare(encoder, lambda images: session.run(None, {"images": images.numpy()})[0], side)
    return f"session = onnxruntime.InferenceSession({str(output)!r}); h, = session.run(None, {{'images': images}})"


def compare(encoder: Encoder, other: Callable[[Tensor], Any], side: int) -> None:
    """Raise RuntimeError unless `other` gives the encoder's representations of random images.

    Compares batches of several sizes, and images that are not square. Raises UserError if the encoder's own
    representations are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 3, side, side), (3, 3, side, side), (5, 3, side, side), (2, 3, side + 16, side)):
        images = torch.randn(shape, generator=generator)
        with torch.inference_mode():
            expected = encoder(images)
        if not expected.isfinite().all():
            raise UserError("--checkpoint: got an encoder whose representations are not finite; use an earlier one")
        error = float((torch.as_tensor(other(images)) - expected).abs().max())
        allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
        if not error <= allowed:
            raise RuntimeError(f"onnxruntime differs from PyTorch by {error:.2g} at {shape}, expected ≤ {allowed:.2g}")


class Format(NamedTuple):
    """An export format: its writer, and the suffixes of its file names (none: a folder)."""

    write: Callable[[Pretrained, Path, Path], str]
    suffixes: tuple[str, ...]


FORMATS = {
    "torchvision": Format(write_torchvision, (".pt", ".pth")),
    "safetensors": Format(write_safetensors, ()),
    "onnx": Format(write_onnx, (".onnx",)),
    "timm": Format(write_timm, ()),
}


# Helpers of the formats


def _write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config_file, weights_file = (folder / name for name in FOLDER_FILES)
    folder.mkdir()
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, weights_file, {"format": "pt"})


def _tensors(encoder: Encoder) -> dict[str, Tensor]:
    return {name: value.detach().clone().contiguous() for name, value in encoder.state_dict().items()}


def _about(pretrained: Pretrained) -> dict[str, str]:
    encoder = pretrained.encoder
    architecture = {"encoder": encoder.spec.name, "width": str(encoder.spec.width), "stem": encoder.spec.stem}
    return architecture | {"origin": pretrained.origin}


def _preparation(augmentation: Augmentation) -> dict[str, Any]:
    """How images must be prepared for the encoder."""
    names = ("image_size", "center_fraction", "interpolation", "mean", "std")
    return {name: getattr(augmentation, name) for name in names}


def _conv1(encoder: Encoder) -> str:
    conv = encoder.conv1
    return f"torch.nn.Conv2d(3, {conv.out_channels}, {conv.kernel_size[0]}, padding={conv.padding[0]}, bias=False)"


def _refuse_unusual_stem(encoder: Encoder, form: str) -> None:
    """Raise UserError for a stem whose padding or activation the format cannot express: they have no tensors."""
    padding = encoder.conv1.kernel_size[0] // 2
    if encoder.conv1.padding != (padding, padding) or not isinstance(encoder.relu, nn.ReLU):
        what = "no ReLU" if not isinstance(encoder.relu, nn.ReLU) else f"a padding of {encoder.conv1.padding[0]}"
        raise UserError(
            f"--format: got {form} for an encoder with {what} in its stem, which {form} cannot express; expected "
            "safetensors or onnx"
        )
