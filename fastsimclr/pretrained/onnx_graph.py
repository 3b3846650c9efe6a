"""Export an encoder as an ONNX graph, and check the graph against PyTorch."""

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsimclr.errors import UserError
from fastsimclr.models import USER_MODULE, Backbone, Encoder
from fastsimclr.pretrained.load import Pretrained

OPSET = 18  # ONNX opset, from 2022
TOLERANCE = 1e-4  # maximum error of a representation, relative to its largest element if that is above 1
LARGEST_PROTOBUF = 2**31 - 2**20  # bytes; a larger ONNX model keeps its weights in a separate file


def write_graph(pretrained: Pretrained, file: Path) -> str:
    """Write the graph, check it, and return the shape of its images.

    The batch is dynamic, and so are height and width, except for encoders whose weights or code depend on them.
    Raises UserError if a package is missing or the representations are not finite, and RuntimeError if onnxruntime's
    representations differ from PyTorch's.
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
    side = augmentation.image_size if augmentation is not None else encoder.spec.image_size
    any_size = accepts_any_size(encoder, side)
    program = _trace(encoder, side, any_size)
    program.model.metadata_props.update(_metadata(pretrained))
    weights = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    program.save(file, external_data=weights > LARGEST_PROTOBUF)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    compare(encoder, lambda images: session.run(None, {"images": images.numpy()})[0], side, any_size=any_size)
    height, width = ("height", "width") if any_size else (side, side)
    return f"(batch, {encoder.spec.channels}, {height}, {width})"


def accepts_any_size(encoder: Encoder | Backbone, side: int) -> bool:
    """Whether the encoder accepts images of another size than `side`, which need not be square."""
    if isinstance(encoder, Encoder) or encoder.spec.name != USER_MODULE:
        return isinstance(encoder, Encoder) or not encoder.fixed_size
    try:
        with torch.inference_mode():
            encoder(torch.zeros(1, encoder.spec.channels, side + 32, side))
    except Exception:  # of the user's code
        return False
    return True


def compare(encoder: Encoder | Backbone, other: Callable[[Tensor], Any], side: int, *, any_size: bool = True) -> None:
    """Raise RuntimeError unless `other` gives the encoder's representations of random images.

    Compares batches of several sizes, and with any_size images that are not square. Raises UserError if the encoder's
    own representations are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, side), (3, side), (5, side), *([(2, side + 32)] if any_size else [])]
    for batch, height in sizes:
        images = torch.randn(batch, encoder.spec.channels, height, side, generator=generator)
        with torch.inference_mode():
            expected = encoder(images)
        if not expected.isfinite().all():
            raise UserError("--checkpoint: got an encoder whose representations are not finite; use an earlier one")
        error = float((torch.as_tensor(other(images)) - expected).abs().max())
        allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
        if not error <= allowed:
            raise RuntimeError(
                f"onnxruntime differs from PyTorch by {error:.2g} for images {tuple(images.shape)}, "
                f"expected ≤ {allowed:.2g}"
            )


def _trace(encoder: Encoder | Backbone, side: int, any_size: bool) -> torch.onnx.ONNXProgram:
    dynamic = {0: "batch", **({2: "height", 3: "width"} if any_size else {})}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # from inside the exporter
        program = torch.onnx.export(
            encoder,
            (torch.zeros(2, encoder.spec.channels, side, side),),
            dynamo=True,
            input_names=["images"],
            output_names=["representation"],
            dynamic_shapes=(dynamic,),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    return program


def _metadata(pretrained: Pretrained) -> dict[str, str]:
    """What the graph records: how the encoder is built, and how its images must be prepared."""
    spec, augmentation = pretrained.encoder.spec, pretrained.augmentation
    metadata = {"encoder": spec.name, "channels": str(spec.channels), "origin": pretrained.origin}
    if isinstance(pretrained.encoder, Encoder):
        metadata |= {"width": str(spec.width), "stem": spec.stem}
    if augmentation is not None:
        names = ("image_size", "center_fraction", "interpolation")
        prepared = {name: getattr(augmentation, name) for name in names}
        prepared["mean"], prepared["std"] = augmentation.statistics
        metadata |= {name: json.dumps(value) for name, value in prepared.items()}
    return metadata
