"""Pre-train an encoder with SimCLR: `fastsimclr train`, or `torchrun -m fastsimclr.train` with several processes.

Exit codes: 0 after the last step, or after SIGTERM or SIGINT with a checkpoint saved; 2 for user errors, reported in
one line; 1 for internal errors.
"""

import sys
from collections.abc import Sequence

from fastsimclr.cli import exit_code
from fastsimclr.config import Config, parse
from fastsimclr.stopping import run_process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return exit_code("train", lambda: run(parse(arguments), arguments))


def run(config: Config, arguments: Sequence[str]) -> None:
    """Train to the last step, or until a stop signal."""
    from fastsimclr import distributed  # here: --help needs no PyTorch
    from fastsimclr.training.pretrain import train

    try:
        train(config, ["python", "-m", "fastsimclr.train", *arguments])
    finally:
        distributed.stop()


if __name__ == "__main__":
    run_process(main)
