"""Show what is installed, what will be used and why, and what to install for more speed.

The exit code is 0 even if something is missing.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from fastsimclr.cli import Parser, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return exit_code("doctor", lambda: run(_options(arguments)))


def run(options: argparse.Namespace) -> None:
    from fastsimclr.environment import describe, examine  # imported here so that --help does not import PyTorch

    found = examine()
    print(json.dumps(found, indent=2) if options.json else describe(found))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m fastsimclr.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
