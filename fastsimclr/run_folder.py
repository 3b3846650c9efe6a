"""A run's folder: the names of its files, its checkpoints, and the one way that a file is written."""

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastsimclr.errors import UserError

FORMAT = 1
MAP, GALLERY = "map.png", "gallery.png"
"""The pictures in the output folder of fastsimclr.embed."""


class RunFolder:
    """The files of a run. None of them need exist."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoints" / "last.pt"
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.trace = self.path / "trace.json.gz"
        self.report = self.path / "report.html"
        self.preview = self.path / "preview.png"
        self.evaluate = self.path / "evaluate"
        self.knn = self.evaluate / "knn.json"
        self.embed = self.path / "embed"
        self.map = self.embed / MAP
        self.gallery = self.embed / GALLERY

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def of(cls, checkpoint: str | Path | None) -> "RunFolder | None":
        """The run that a --checkpoint (RUN or RUN/checkpoints/last.pt) belongs to; None for any other file."""
        if checkpoint is None:
            return None
        path = Path(checkpoint)
        run = cls(path if path.is_dir() else path.parent.parent)
        return run if run.checkpoint.parent.is_dir() and run.config.is_file() else None

    @classmethod
    def for_results(cls, checkpoint: str | Path | None) -> "RunFolder":
        """The run of a --checkpoint, whose folder takes the results for want of --output. Raises UserError if none."""
        run = cls.of(checkpoint)
        if run is None:
            raise UserError("--output: got none, and --checkpoint is not in a run's folder; expected a folder")
        return run

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint. state: tensors, numbers, strings and containers of them."""
        with replace_atomically(self.checkpoint) as partial, open(partial, "wb") as file:
            torch.save(state | {"format": FORMAT}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `RunFolder.save` wrote, on the CPU. Never runs code from the file.

    Raises UserError if it is missing, damaged, or another program's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: got no such file, expected a checkpoint (RUN/checkpoints/last.pt)") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: got a damaged file or no checkpoint, expected one that a run wrote") from error
    if not is_checkpoint(state):
        raise UserError(f"{path}: got a file of another kind, expected a checkpoint that a fastsimclr run wrote")
    return state


def is_checkpoint(state: Any) -> bool:
    """Whether `RunFolder.save` wrote this, in the format of this version."""
    return isinstance(state, dict) and state.get("format") == FORMAT


def scan_cache(checkpoint: str | Path | None, output: Path) -> Path:
    """The folder that keeps the results of a scan for bad images: that of the checkpoint's run, where train has scanned
    its images, or `output` if there is no such folder or it is read-only."""
    run = RunFolder.of(checkpoint)
    return run.path if run is not None and os.access(run.path, os.W_OK) else output


def check_new(output: Path, force: bool, option: str = "--output") -> None:
    """Raise UserError if `output` exists and may not be overwritten."""
    if output.exists() and not force:
        raise UserError(f"{option}: got {output}, which already exists; give another name, or --force to overwrite it")


@contextlib.contextmanager
def replace_atomically(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Write a file that replaces `path` atomically: the block fills the file `partial` (by default, path.partial).

    When the block ends, the file is flushed to the disk and renamed, so that `path` is never half written. If the block
    fails, `path` is left as it was.
    """
    partial = partial or temporary_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        rename_atomically(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the reason to report is the first one
            partial.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """The name of a file that is not yet complete."""
    return path.with_name(f"{path.name}.partial")


def rename_atomically(partial: Path, path: Path) -> None:
    """Flush a complete file to the disk and give it its final name."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    with replace_atomically(path) as partial:
        partial.write_text(text)


def write_atomically(output: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill the file that is to replace the user's `output`. Raises UserError if it cannot be written."""
    try:
        with replace_atomically(output) as partial:
            write(partial)
    except OSError as error:
        raise UserError(f"--output: got {output}, which cannot be written ({error.strerror})") from error
