"""What is here, what will be used, why, and what to install to be faster.

It ends with 0 whatever is missing: to say so is what it is for.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from fastsimclr.cli import Parser, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code("doctor", lambda: run(_options(arguments)))


def run(options: argparse.Namespace) -> None:
    from fastsimclr.environment import describe, examine  # here: --help needs no PyTorch

    found = examine()
    print(json.dumps(found, indent=2) if options.json else describe(found))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m fastsimclr.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same for programs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
