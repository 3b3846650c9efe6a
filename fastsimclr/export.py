"""Export the encoder of a checkpoint for other libraries:

    python -m fastsimclr.export --checkpoint runs/photos --format onnx --output encoder.onnx

torchvision: a state dict (.pt) of torchvision's ResNet. safetensors: any width and stem, with the preprocessing of the
images. onnx: the graph, whose output in onnxruntime is checked against PyTorch's. timm: a folder in the layout of the
Hugging Face hub. Exit codes are those of fastsimclr.train.
"""

import argparse
import sys
from collections.abc import Sequence

from fastsimclr.cli import Parser, exit_code

FORMATS = ("torchvision", "safetensors", "onnx", "timm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code("export", lambda: run(_options(arguments)))


def run(options: argparse.Namespace) -> None:
    from fastsimclr.pretrained.export import export  # here: --help needs no PyTorch

    print(export(options))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m fastsimclr.export", description=(__doc__ or "").split(":")[0], allow_abbrev=False)
    parser.add_argument(
        "--checkpoint", required=True, metavar="F", help="a run's folder, a checkpoint, or another project's checkpoint"
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="torchvision: a state dict; safetensors: any width and stem, for fastsimclr.load_encoder; onnx; timm: a "
        "folder for timm.create_model",
    )
    parser.add_argument("--output", required=True, metavar="F", help="the file to write; for timm, the folder")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
