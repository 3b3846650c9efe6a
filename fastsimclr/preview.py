"""What the encoder will see: a sheet of images, their crops, and their views with what was drawn for each of them.

    python -m fastsimclr.preview --data photos/ --config cifar10 --data.image_size 64 --output views.png

The views are the loader's own; the words under them are the same draws, made again. Shuffled, the images are those that
training with these options and this seed begins the epoch with. Exit codes as of fastsimclr.train.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastsimclr.cli import Parser, exit_code
from fastsimclr.data.backends import BACKENDS
from fastsimclr.errors import UserError

MAX_IMAGES = 100  # Agg draws no more than 2^16 pixels in one direction


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code("preview", lambda: print(run(*_options(arguments))))


def run(options: argparse.Namespace, others: list[str]) -> str:
    """Write the sheet; returns the summary line to print."""
    from fastsimclr.reporting.preview import write_preview  # imports torch: not for --help

    return write_preview(options, others)


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The preview's own options, and those for train's configuration."""
    parser = Parser(
        prog="python -m fastsimclr.preview",
        description=(__doc__ or "").split("\n")[0],
        epilog="Any --data.* option of python -m fastsimclr.train changes the recipe: --data.image_size 96",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        "--data.train",
        metavar="PATH",
        help="a folder of images, tar shards, digits or cifar10[:ROOT]; default: --config's, or else digits",
    )
    parser.add_argument(
        "--config",
        metavar="NAME_OR_FILE",
        help="a preset (digits, cifar10, imagenet), or a YAML file of train's options such as a run's config.yaml",
    )
    parser.add_argument(
        "--backend",
        "--data.backend",
        choices=BACKENDS,
        help="decodes and crops; default: auto",
    )
    parser.add_argument("--images", type=int, default=8, metavar="N", help="rows of the sheet; default: 8")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="whose views to draw, from 0 on; default: 0")
    parser.add_argument("--seed", type=int, metavar="N", help="of order and draws; default: --config's, or else 0")
    parser.add_argument("--unshuffled", action="store_true", help="the data's first images, the same at each epoch")
    parser.add_argument("--output", default="preview.png", metavar="F.png", help="default: preview.png")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    options, others = parser.parse_known_args(arguments)
    if others and not others[0].startswith("--"):
        parser.error(f"got {others[0]}, expected an option: --data {others[0]}")
    for option in others:
        if option.startswith("--") and not option.startswith("--data."):
            parser.error(f"{option}: got an option that is not preview's, expected its own or --data.*")
    for name, least, most in (("images", 1, MAX_IMAGES), ("epoch", 0, 2**32 - 1)):
        if not least <= getattr(options, name) <= most:
            raise UserError(f"--{name}: got {getattr(options, name)}, expected {least} to {most}")
    if Path(options.output).suffix.lower() != ".png":
        raise UserError(f"--output: got {options.output}, expected a file name that ends in .png")
    return options, others


if __name__ == "__main__":
    sys.exit(main())
