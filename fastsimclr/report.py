"""Write a self-contained HTML report of one run, or a comparison of several.

    python -m fastsimclr.report runs/photos                                   # writes runs/photos/report.html
    python -m fastsimclr.report runs/a runs/b --output compared.html

If a run has no contact sheet, embedding map or kNN evaluation yet, the commands preview, embed and evaluate make them
first. Exit codes are those of fastsimclr.train.
"""

import argparse
import sys
from collections.abc import Sequence

from fastsimclr.cli import Parser, exit_code
from fastsimclr.stopping import run_process

MAX_RUNS = 40  # 8 colors x 5 dashes: each run has its own combination


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code("report", lambda: print(run(_options(arguments), arguments)))


def run(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """Write the page and return the summary line to print."""
    from fastsimclr.reporting.report import write_report  # imports torch and matplotlib: not for --help

    return write_report(options, arguments)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m fastsimclr.report",
        description=(__doc__ or "").split("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a run's folder: the --output of fastsimclr.train")
    parser.add_argument("--output", metavar="F.html", help="HTML file; default for one run: RUN_DIR/report.html")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    parser.add_argument("--only_collect", action="store_true", help="do not run other commands to make missing parts")
    options = parser.parse_args(arguments)
    if len(options.runs) > MAX_RUNS:
        parser.error(f"got {len(options.runs)} runs, expected up to {MAX_RUNS}")
    return options


if __name__ == "__main__":
    run_process(main)
