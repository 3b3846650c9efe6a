"""Preview the augmentation: one sheet with images, their crops, and their views with the sampled parameters.

    python -m fastsimclr.preview --data photos/ --config cifar10 --data.image_size 64 --output views.png

The views come from the training data loader; the captions sample the same parameters again. Unless --unshuffled is
given, the images are the first of the epoch in training with these options and this seed. Exit codes are those of
fastsimclr.train.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from fastsimclr.cli import Parser, exit_code
from fastsimclr.data.backends import BACKENDS
from fastsimclr.errors import UserError
from fastsimclr.ranges import Range, Seed, number
from fastsimclr.stopping import run_process

Rows = Annotated[int, Range(1, 100)]  # Agg draws no more than 2^16 pixels in one direction
Epoch = Annotated[int, Range(0, 2**32 - 1)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code("preview", lambda: print(run(*_options(arguments))))


def run(options: argparse.Namespace, others: list[str]) -> str:
    """Write the sheet and return the summary line to print."""
    from fastsimclr.reporting.preview import write_preview  # imports torch: not for --help

    return write_preview(options, others)


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options; returns preview's own, and those to parse as train's configuration."""
    parser = Parser(
        prog="python -m fastsimclr.preview",
        description=(__doc__ or "").split("\n")[0],
        epilog="Any --data.* option of python -m fastsimclr.train changes the augmentation: --data.image_size 96",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        "--data.train",
        metavar="PATH",
        help="a folder of images, tar shards, digits or cifar10[:ROOT]; default: from --config, else digits",
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
        help="backend that decodes and crops; default: auto",
    )
    parser.add_argument("--images", type=number(Rows), default=8, metavar="N", help="rows of the sheet; default: 8")
    parser.add_argument("--epoch", type=number(Epoch), default=0, metavar="N", help="epoch to show, from 0; default: 0")
    parser.add_argument("--seed", type=number(Seed), metavar="N", help="random seed; default: from --config, else 0")
    parser.add_argument("--unshuffled", action="store_true", help="show the dataset's first images instead")
    parser.add_argument(
        "--show_channels",
        type=_channels,
        metavar="R,G,B",
        help="three channels to show as red, green and blue, from 0; default: the first three, or the first as gray",
    )
    parser.add_argument("--output", default="preview.png", metavar="F.png", help="PNG file; default: preview.png")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    options, others = parser.parse_known_args(arguments)
    if others and not others[0].startswith("--"):
        parser.error(f"got {others[0]}, expected an option: --data {others[0]}")
    for option in others:
        if option.startswith("--") and not option.startswith("--data."):
            parser.error(f"{option}: got an unknown option, expected one of preview's or --data.*")
    if Path(options.output).suffix.lower() != ".png":
        raise UserError(f"--output: got {options.output}, expected a file name that ends in .png")
    return options, others


def _channels(text: str) -> tuple[int, ...]:
    channels = tuple(int(number) for number in text.split(","))
    if len(channels) != 3 or min(channels) < 0:
        raise ValueError
    return channels


if __name__ == "__main__":
    run_process(main)
