"""Export the encoder of a checkpoint for other libraries:

    python -m fastsimclr.export --checkpoint runs/photos --format onnx --output encoder.onnx

torchvision: a state dict (.pt) of torchvision's model. safetensors: a folder for fastsimclr.load_encoder and the
Hugging Face Hub, of any encoder: weights, how it is built, the preparation of its images, and a model card. onnx: the
graph of any encoder, whose output in onnxruntime is checked against PyTorch's. timm: a folder for timm.create_model.
Exit codes are those of fastsimclr.train.
"""

import argparse
from collections.abc import Sequence

from fastsimclr.cli import ENCODER_HELP, Parser, exit_code
from fastsimclr.stopping import run_process

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
        help="torchvision: a state dict; safetensors: a folder for fastsimclr.load_encoder and the Hugging Face Hub; "
        "onnx; timm: a folder for timm.create_model",
    )
    parser.add_argument(
        "--output", required=True, metavar="F", help="the file to write; for safetensors and timm, the folder"
    )
    parser.add_argument("--encoder", metavar="NAME", help=ENCODER_HELP)
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_process(main)
