"""Save and restore a run: one file, replaced atomically, that holds no code."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from fastsimclr.errors import UserError

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) so that `path` is always a whole checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state | {"format": FORMAT}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote, on the CPU. Never runs code from the file.

    Raises UserError if it is missing, damaged, or not one of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: got no such file, expected a checkpoint (RUN/checkpoints/last.pt)") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path}: got a file that is damaged or no checkpoint, expected one that a run wrote"
        ) from error
    if not is_run(state):
        raise UserError(f"{path}: got a file of another kind, expected a checkpoint that a fastsimclr run wrote")
    return state


def is_run(state: Any) -> bool:
    """Whether this is what `save` wrote, in the format of this version."""
    return isinstance(state, dict) and state.get("format") == FORMAT


def check_architecture(path: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise UserError, naming each difference, unless a checkpoint's model is built as ours."""
    differences = [
        f"{name} {saved.get(name)!r} instead of {value!r}"
        for name, value in expected.items()
        if saved.get(name) != value
    ]
    if differences:
        raise UserError(
            f"{path}: got a checkpoint of another architecture ({', '.join(differences)}); expected this run's: change "
            "the --model options, or give another --output, or --resume never"
        )
