"""What every command line shares: options that do not fit, exit codes, and outputs that are not overwritten."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
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


def check_new(output: Path, force: bool, option: str = "--output") -> None:
    """Raise UserError if `output` is there already, and may not be overwritten."""
    if output.exists() and not force:
        raise UserError(
            f"{option}: got {output}, which is there already; give another name, or --force to overwrite it"
        )


def run_folder(checkpoint: str | Path | None) -> Path | None:
    """The run's folder of a --checkpoint that is one (RUN, or RUN/checkpoints/last.pt): where results of it go."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent.parent
    return folder if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file() else None


def scan_cache(checkpoint: str | Path | None, output: Path) -> Path:
    """The folder where a scan for bad images keeps what it finds: the run's, where train has kept it of its images; or
    else `output`."""
    run = run_folder(checkpoint)
    return run if run is not None and os.access(run, os.W_OK) else output


def write_whole(output: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file that takes the name `output` once it is whole. Raises UserError if it cannot be
    written."""
    partial = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"--output: got {output}, which cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):  # where nothing could be written, nothing can be removed
            partial.unlink(missing_ok=True)
