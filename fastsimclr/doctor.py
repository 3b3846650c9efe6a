"""Show what is installed, what will be used and why; with --data, check every image of a data set; with --run, show
whether a run is alive.

With --data all images are decoded, on all cores, and under torchrun on all ranks. An interrupted check is resumed by
the same command. Its results are kept in the cache folder, where runs on the same data find them.

Exit codes: 0, even if something is missing; with --data 1 if images are bad, and 143 or 130 if SIGTERM or SIGINT ended
the check; with --run 1 if the run has stopped before its last step or was killed; 2 for a user error.
"""

import argparse
import fnmatch
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastsimclr.cli import Parser, exit_code
from fastsimclr.errors import UserError
from fastsimclr.ranges import Channels, Count, number
from fastsimclr.stopping import run_process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return exit_code("doctor", lambda: run(_options(arguments)))


def run(options: argparse.Namespace) -> int:
    if options.data is not None:
        return check(options)
    if options.run is not None:
        return show_run(options)
    if options.encoders is not None:
        print(*list_encoders(options.encoders), sep="\n")
        return 0
    from fastsimclr.environment import describe, examine  # imported here so that --help does not import PyTorch

    found = examine()
    print(json.dumps(found, indent=2) if options.json else describe(found))
    return 0


def check(options: argparse.Namespace) -> int:
    """Check the images of --data, print the summary, and return the exit code."""
    from fastsimclr import distributed, stopping
    from fastsimclr.data.full_check import check_data
    from fastsimclr.data.pixel_options import PixelOptions
    from fastsimclr.data.scan import write_lines
    from fastsimclr.distributed import run_on_all_ranks
    from fastsimclr.run_folder import check_output

    pixels = PixelOptions(options.pixels, options.channels, max_pixels=options.max_pixels)
    try:
        stop = stopping.active()
        world = distributed.start("cpu")
        is_listing = options.list is not None and world.is_rank_zero
        run_on_all_ranks(lambda: check_output(Path(options.list), True, "--list") if is_listing else None, world)
        found = check_data(
            options.data, cache=options.cache, pixels=pixels, world=world, stop=lambda: stop.received != 0
        )
    finally:
        distributed.stop()
    if world.is_rank_zero:
        if is_listing:
            write_lines(Path(options.list), [str(bad) for bad in found.bad])
        print(json.dumps(asdict(found), indent=2) if options.json else found.describe())
    return 1 if found.bad else 0


def show_run(options: argparse.Namespace) -> int:
    """Print the state of --run, and return the exit code."""
    from fastsimclr.reporting.run_status import read_status
    from fastsimclr.run_folder import RunFolder

    status = read_status(RunFolder(options.run))
    print(json.dumps(asdict(status), indent=2) if options.json else status.describe())
    return 0 if status.is_well else 1


def list_encoders(pattern: str) -> list[str]:
    """Return the names of encoders that match, and a line with their number. Raises UserError if none does."""
    from fastsimclr.models import encoder_names, nearest_encoders

    names = fnmatch.filter(encoder_names(), pattern)
    if not names:
        raise UserError(
            f"--encoders: got {pattern!r}, which matches no encoder; expected a pattern such as '*vit*'; "
            f"the nearest are {nearest_encoders(pattern.strip('*'))}"
        )
    return [*names, f"{len(names)} encoder{'s' if len(names) > 1 else ''}"]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m fastsimclr.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--encoders", metavar="PATTERN", help="list the encoders whose names match, such as '*vit*'")
    parser.add_argument(
        "--run", metavar="RUN", help="show the state of this run: alive, phase, speed, checkpoint, skipped images"
    )
    data = parser.add_argument_group("full check of a data set")
    data.add_argument("--data", metavar="PATH", help="check every image: a path that train takes as --data.train")
    data.add_argument("--list", metavar="FILE", help="write the bad images and the reasons to this file, one a line")
    data.add_argument("--cache", metavar="DIR", help="folder of the results; default: ~/.cache/fastsimclr")
    data.add_argument("--pixels", choices=("uint8", "uint16", "float32"), help="as data.pixels of train")
    data.add_argument("--channels", type=number(Channels), metavar="N", help="as data.channels of train")
    data.add_argument(
        "--max_pixels",
        type=number(Count),
        default=200_000_000,
        metavar="N",
        help="as data.max_pixels of train; default: 200000000",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_process(main)
