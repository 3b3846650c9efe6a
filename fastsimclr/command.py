"""What every command line shares: one-line complaints and exit codes."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from fastsimclr.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, as all of ours are."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


def exit_code(program: str, work: Callable[[], object]) -> int:
    """Do the work of python -m fastsimclr.`program`. 0: done; 2: a user's mistake, in one line on the first rank's
    stderr. Any other exception is a fault of ours, and goes on."""
    try:
        work()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"fastsimclr.{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
