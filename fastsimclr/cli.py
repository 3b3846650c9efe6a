"""The console script `fastsimclr COMMAND`, and the argument parser and exit codes of all commands.

Exit codes: 0: success; 2: a user error, reported as one line on stderr; 1: a run that failed
for a reason outside it, in one line, or an internal error, with its traceback.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fastsimclr.errors import OtherRankError, RunError, UserError
from fastsimclr.version import __version__

COMMANDS = {
    "train": "pre-train an encoder with SimCLR",
    "evaluate": "evaluate an encoder by kNN, linear, fine-tuned or supervised classification",
    "embed": "write the features of all images, a map of them and their nearest neighbors",
    "export": "convert an encoder for torchvision, safetensors, ONNX or timm",
    "preview": "draw the views that an encoder will see",
    "shard": "pack images into tar shards",
    "report": "write an HTML report of one run, or a comparison of several",
    "doctor": "show what is installed, what will be used, and why; check the images of a data set",
}
"""Commands and their help. Command X is the module fastsimclr.X, imported only when the command runs."""
ENCODER_HELP = (
    "expected encoder, such as resnet50 or timm/NAME; for weights of a module of your own, the function that makes it, "
    "such as mymodel.py:make_encoder"
)
"""Help of the option --encoder, beside --checkpoint."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `fastsimclr COMMAND` and return the exit code."""
    command, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        print(f"fastsimclr {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"fastsimclr: error: got {command!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"fastsimclr.{command}").main(options))


def usage() -> str:
    """Return the text of `fastsimclr --help`."""
    commands = "\n".join(f"  {name:9} {about}" for name, about in COMMANDS.items())
    return f"""usage: fastsimclr COMMAND [options]
       fastsimclr COMMAND --help
       fastsimclr --version

{commands}

`python -m fastsimclr.COMMAND` is equivalent and can be run under torchrun."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports errors in one line."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def exit_code(command: str, work: Callable[[], object]) -> int:
    """Run `work` and return the exit code of fastsimclr.`command`: 2 after a UserError, 1 after a RunError.

    It is 1 after OtherRankError, too. Otherwise it is 0, or the integer that `work` returns. Rank 0 prints the
    UserError, and the rank that raised it a RunError. Other exceptions are internal errors and propagate.
    """
    try:
        code = work()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"fastsimclr.{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"fastsimclr.{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except OtherRankError:  # that rank prints it
        return 1
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
