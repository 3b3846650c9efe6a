"""The console script `fastsimclr COMMAND`, and the argument parser and exit codes of all commands.

Exit codes: 0: success; 2: a user error, reported as one line on stderr; 1: a run that failed
for a reason outside it, in one line, or an internal error, with its traceback.
"""

import argparse
import contextlib
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastsimclr.errors import OtherRankError, RunError, UserError
from fastsimclr.stopping import Stopped, run_process, stop_signals
from fastsimclr.version import __version__

COMMANDS = {
    "train": "pre-train an encoder with SimCLR",
    "evaluate": "evaluate an encoder by kNN, linear, fine-tuned or supervised classification",
    "embed": "write the features of all images, a map of them and their nearest neighbors",
    "export": "convert an encoder for torchvision, safetensors, ONNX or timm",
    "preview": "draw the views that an encoder will see",
    "shard": "pack images into tar shards",
    "report": "write an HTML report of one run, or a comparison of several",
    "plan": "predict step time, memory and epoch time on several GPUs from a short run on one",
    "doctor": "show what is installed, what will be used, and why; check the images of a data set",
}
"""Commands and their help. Command X is the module fastsimclr.X, imported only when the command runs."""
REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}
"""Error numbers for files that cannot be used. A missing file is not one: the code that expects it says so."""
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

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if any("\0" in argument for argument in args or ()):  # which no shell passes, but a program may
            self.error("got a NUL character in an argument, expected none")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> Any:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def exit_code(command: str, work: Callable[[], object]) -> int:
    """Run `work` and return the exit code of fastsimclr.`command`: 2 after a UserError, 1 after a RunError.

    It is 1 after OtherRankError, too. Otherwise it is 0, or the integer that `work` returns. Rank 0 prints a UserError
    of all ranks, the first rank of each machine one of its own, such as of its options, and the rank that raised it a
    RunError. A file that the operating system refuses, such as one on a read-only disk, is a user error, too. Other
    exceptions are internal errors and propagate.

    After a stop signal it is 128 + the signal's number, as in a shell, but 0 for train.
    """
    with _lasting_output(), stop_signals() as stop:
        stop.program, stop.returns_zero = f"fastsimclr.{command}", command == "train"
        try:
            stop.finish(_exit_code(command, lambda: stop.run(work)))
        except Stopped:
            if not _is_later_rank("RANK", "WORLD_SIZE"):
                print(stop.describe(), file=sys.stderr)
            stop.finish(stop.exit_code)
        return stop.exit_code


def _exit_code(command: str, work: Callable[[], object]) -> int:
    """Run `work` and return its exit code, as `exit_code` does where there is no stop signal."""
    on_all_ranks = False
    try:
        code = work()
    except OtherRankError:  # that rank prints it
        return 1
    except RunError as error:
        print(f"fastsimclr.{command}: error: {_one_line(str(error))}", file=sys.stderr)
        return 1
    except UserError as error:
        message, on_all_ranks = str(error), error.on_all_ranks
    except OSError as error:
        if error.errno not in REFUSALS or error.filename is None:
            raise
        path = os.fsdecode(error.filename)
        message = f"{path}: got {error.strerror!r} from the system, expected a path that can be used"
    else:
        return code if isinstance(code, int) else 0
    if not (_is_later_rank("RANK", "WORLD_SIZE") if on_all_ranks else _is_later_rank("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        print(f"fastsimclr.{command}: error: {_one_line(message)}", file=sys.stderr)
    return 2


def _is_later_rank(rank: str, world_size: str) -> bool:
    """Return whether this rank, by these environment variables, is not the first. They may be the error."""
    own, all_ranks = os.environ.get(rank, ""), os.environ.get(world_size, "")
    return own.isdecimal() and all_ranks.isdecimal() and 0 < int(own) < int(all_ranks)


def _one_line(message: str) -> str:
    """Return the message as one line, with long words shortened: a value or a path may have any length."""
    return " ".join(word if len(word) <= 300 else f"{word[:150]}…{word[-149:]}" for word in message.split())


@contextlib.contextmanager
def _lasting_output() -> Iterator[None]:
    """Keep a command from failing because its output has lost its reader (`| head`) or cannot encode a file's name."""
    with contextlib.ExitStack() as stack:
        for redirect, stream in ((contextlib.redirect_stdout, sys.stdout), (contextlib.redirect_stderr, sys.stderr)):
            if not isinstance(stream, io.TextIOWrapper):  # an object of a notebook or a test
                continue
            if isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
                stream.flush()
                file = io.BufferedWriter(_LastingFile(stream.fileno(), "w", closefd=False))
                by_line = bool(stream.line_buffering or stream.write_through)
                lasting = io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=by_line)
                stack.callback(lasting.flush)  # not close: loggers may keep it
                stack.enter_context(redirect(lasting))
        yield


class _LastingFile(io.FileIO):
    """A file that discards what is written after its reader has closed the pipe."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def script() -> None:
    """The console script."""
    run_process(main)


if __name__ == "__main__":
    script()
