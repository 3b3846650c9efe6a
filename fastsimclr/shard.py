"""Pack images into tar shards, which are read faster than single files from network storage:

    python -m fastsimclr.shard photos/ --output shards/
    python -m fastsimclr.train --data.train 'shards/*.tar'

A run that was stopped is resumed by the same command. Exit codes are those of fastsimclr.train.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from fastsimclr.cli import Parser, exit_code
from fastsimclr.errors import UserError
from fastsimclr.ranges import Count, Side, Workers, number
from fastsimclr.stopping import run_process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code("shard", lambda: print(run(_options(arguments))))


def run(options: argparse.Namespace) -> str:
    """Write or verify the shards and return the summary line to print."""
    from fastsimclr.data.writing import shard, verify_shards  # here: --help needs no PyTorch

    folder = Path(options.output).expanduser()
    if options.verify:
        manifest = verify_shards(folder)
        return f"{folder}: {manifest.images:,} images in {manifest.count:,} shards, as in the manifest"
    return shard(options.data, folder, resize=options.resize, shard_mb=options.shard_mb, workers=options.workers)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m fastsimclr.shard", description=(__doc__ or "").split(",")[0], allow_abbrev=False)
    parser.add_argument(
        "data", nargs="?", metavar="PATH", help="images in any form that --data.train takes; not with --verify"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--resize",
        type=number(Side),
        metavar="N",
        help="scale images whose shorter side is above N pixels to N, upright: JPEG of quality 95 if they are JPEG, "
        "else PNG; images that do not decode are skipped; default: bytes unchanged",
    )
    parser.add_argument(
        "--shard_mb", type=number(Count), default=256, metavar="MB", help="approximate size; default: 256"
    )
    parser.add_argument("--workers", type=number(Workers), metavar="N", help="processes; default: one per core")
    parser.add_argument(
        "--verify", action="store_true", help="compare the shards in --output with their manifest instead"
    )
    options = parser.parse_args(arguments)
    if options.verify == (options.data is not None):
        raise UserError("got " + ("PATH and" if options.verify else "neither PATH nor") + " --verify, expected one")
    if options.workers is None:
        options.workers = len(os.sched_getaffinity(0))
    return options


if __name__ == "__main__":
    run_process(main)
