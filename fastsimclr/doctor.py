"""Show what is installed, what will be used and why, and what to install for more speed.

The exit code is 0 even if something is missing.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence

from fastsimclr.cli import Parser, exit_code
from fastsimclr.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return exit_code("doctor", lambda: run(_options(arguments)))


def run(options: argparse.Namespace) -> None:
    if options.encoders is not None:
        print(*list_encoders(options.encoders), sep="\n")
        return
    from fastsimclr.environment import describe, examine  # imported here so that --help does not import PyTorch

    found = examine()
    print(json.dumps(found, indent=2) if options.json else describe(found))


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
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
