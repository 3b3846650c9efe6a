"""A run folder: the names of its files, its newest good checkpoint, and atomic writing of files."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fastsimclr.checkpoint_format import Checkpoint
from fastsimclr.errors import UserError

MAP, GALLERY = "map.png", "gallery.png"
"""The images in the output folder of fastsimclr.embed."""


class RunFolder:
    """Paths of the files of a run, which need not exist."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoints" / "last.pt"
        self.previous_checkpoint = self.checkpoint.with_name("previous.pt")
        self.best_checkpoint = self.checkpoint.with_name("best.pt")
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.images = self.path / "images.npz"
        self.lock = self.path / "lock"
        self.stacks = self.path / "stacks"
        self.metrics = self.path / "metrics.jsonl"
        self.damaged_metrics = self.path / "metrics_damaged.txt"
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

    def epoch_checkpoint(self, epoch: int) -> Path:
        """Return the path of the checkpoint that --keep_every keeps after `epoch` epochs."""
        return self.checkpoint.with_name(f"epoch-{epoch:04d}.pt")

    def non_finite(self, rank: int) -> Path:
        """Return the path of the views and norms of the step at which the run ended, as its loss was not finite."""
        return self.path / f"non_finite-rank{rank}.pt"

    def logger_id(self, logger: str) -> Path:
        """Return the path of the file with this run's id at a logger: wandb or mlflow."""
        return self.path / f"{logger}_id.txt"

    @classmethod
    def of(cls, checkpoint: str | Path | None) -> "RunFolder | None":
        """Return the run of a --checkpoint (RUN or RUN/checkpoints/*.pt); None for any other file."""
        if checkpoint is None:
            return None
        path = Path(checkpoint)
        run = cls(path if path.is_dir() else path.parent.parent)
        return run if run.checkpoint.parent.is_dir() and run.config.is_file() else None

    @classmethod
    def for_results(cls, checkpoint: str | Path | None) -> "RunFolder":
        """Return the run of a --checkpoint, the default for --output. Raises UserError if it is not in a run folder."""
        run = cls.of(checkpoint)
        if run is None:
            raise UserError("--output: got none, and --checkpoint is not in a run folder; expected a folder")
        return run

    def newest_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """Find the newest good checkpoint: last.pt, the one before it, or the latest of --keep_every.

        Returns None if the run has no checkpoint, and a line about each newer one that is not good.
        Raises UserError if there are checkpoints, but none is good.
        """
        newest_first = [self.checkpoint, self.previous_checkpoint]
        newest_first += sorted(self.checkpoint.parent.glob("epoch-*.pt"), reverse=True)
        problems: list[str] = []
        for path in filter(os.path.lexists, newest_first):
            try:
                return Checkpoint.open(path), problems
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("; ".join(problems))
        return None, []

    def keep(self, checkpoint: Path, kept: Path) -> None:
        """Keep a checkpoint as the file `kept`: a hard link, or a copy where the file system has no links.

        Replaces `kept` atomically. Raises OSError if that fails.
        """
        if kept.exists() and kept.samefile(checkpoint):
            return
        with replace_atomically(kept) as partial:
            partial.unlink(missing_ok=True)  # from an interrupted process
            try:
                os.link(checkpoint, partial)
            except OSError:
                shutil.copyfile(checkpoint, partial)


def check_output(output: Path, force: bool, option: str = "--output", *, is_folder: bool = False) -> None:
    """Raise UserError if the file or folder `output` exists and may not be replaced, or cannot be written.

    Creates nothing.
    """
    if output.exists() and output.is_dir() != is_folder:
        expected, got = ("folder", "file") if is_folder else ("file", "folder")
        raise UserError(f"{option}: got {output}, which is a {got}; expected a {expected}: give another name")
    if output.exists() and not force:
        raise UserError(f"{option}: got {output}, which already exists; choose another name or --force to replace it")
    folder = next((parent for parent in output.parents if os.path.lexists(parent)), output)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = f"{folder} is read-only" if folder.is_dir() else f"{folder} is not a folder"
        raise UserError(f"{option}: got {output}, which cannot be written ({reason}); choose another folder")


@contextlib.contextmanager
def replace_atomically(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Replace the file `path` atomically: the block writes the file `partial` (default: path.partial).

    When the block ends, the file is flushed to disk and renamed, so `path` is never partially written. If the block
    raises, `path` is left unchanged.
    """
    partial = partial or temporary_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        rename_atomically(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # report the first error
            partial.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """Return the name of the incomplete file of `path`."""
    return path.with_name(f"{path.name}.partial")


def rename_atomically(partial: Path, path: Path) -> None:
    """Flush a complete file to disk, rename it to `path`, and flush the folder, which has the new name."""
    flush(partial)
    os.replace(partial, path)
    with contextlib.suppress(OSError):  # some file systems cannot flush a folder
        flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    with replace_atomically(path) as partial:
        partial.write_text(text)


def write_atomically(output: Path, write: Callable[[Path], object]) -> None:
    """Replace the file `output` atomically with the one that `write` writes. Raises UserError if that fails."""
    try:
        with replace_atomically(output) as partial:
            write(partial)
    except OSError as error:
        raise UserError(f"--output: got {output}, which cannot be written ({error.strerror})") from error
