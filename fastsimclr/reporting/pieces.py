"""Parts of a report that other commands make: found in the run's folder, or made there now."""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Piece:
    """command: what makes it, after `python -m fastsimclr.`; {run} is the run's folder, {knn_k} its option."""

    what: str
    file: str
    command: tuple[str, ...]


CHECKPOINT = "checkpoints/last.pt"
VIEWS = Piece(
    "contact sheet of the views",
    "preview.png",
    ("preview", "--config", "{run}/config.yaml", "--output", "{run}/preview.png"),
)
EMBEDDING = Piece(
    "map of the embedding",
    "embed/map.png",
    ("embed", "--checkpoint", f"{{run}}/{CHECKPOINT}", "--images", "2000"),
)
KNN = Piece(
    "evaluation by nearest neighbours",
    "evaluate/knn.json",
    ("evaluate", "knn", "--k", "{knn_k}", "--checkpoint", f"{{run}}/{CHECKPOINT}"),  # as many as its curve's
)
PIECES = (VIEWS, EMBEDDING, KNN)


@dataclass(frozen=True)
class Missing:
    """A piece that is not there: why, and the command that would make it."""

    what: str
    why: str
    command: str


def gather(folder: Path, knn_k: str, make: bool) -> dict[str, Missing]:
    """Make a run's pieces that are not there, if asked to; returns those that still are not, by their files."""
    missing = {}
    for piece in PIECES:
        if (folder / piece.file).exists():
            continue
        module, *arguments = (word.replace("{run}", str(folder)).replace("{knn_k}", knn_k) for word in piece.command)
        command = f"python -m fastsimclr.{module} {shlex.join(arguments)}"
        if CHECKPOINT in command and not (folder / CHECKPOINT).exists():
            why = f"there is no {CHECKPOINT}"
        elif not make:
            why = "not made yet"
        else:
            print(f"fastsimclr.report: {command}", file=sys.stderr, flush=True)
            why = _run(module, arguments)
        if not (folder / piece.file).exists():
            missing[piece.file] = Missing(piece.what, why or f"{piece.file} was not written", command)
    return missing


def _run(module: str, arguments: list[str]) -> str:
    """Run one of our commands; returns why it failed, if it did."""
    done = subprocess.run(
        [sys.executable, "-m", f"fastsimclr.{module}", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"]
    why = said[-1].removeprefix(f"fastsimclr.{module}: error: ")
    print(f"fastsimclr.report: left out: {why}", file=sys.stderr, flush=True)
    return why
