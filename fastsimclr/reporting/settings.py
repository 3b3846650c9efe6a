"""A run's configuration and environment, and their differences between runs."""

import dataclasses
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastsimclr.config import Config
from fastsimclr.reporting.run_record import Run, flattened

OUTPUT = "output"
"""The option that always differs between runs."""


def differing(found: Sequence[dict[str, str]]) -> list[str]:
    """The names whose values differ."""
    names = dict.fromkeys(name for each in found for name in each if name != OUTPUT)
    return [name for name in names if len({each.get(name) for each in found}) > 1]


def changed(run: Run) -> list[str]:
    """The options of a run that differ from the defaults."""
    return differing([run.config, dict(flattened(dataclasses.asdict(Config()))) | {OUTPUT: ""}])


def environment(run: Run) -> dict[str, str]:
    """The recorded environment of a run, by names with dots."""
    recorded = dict(run.environment)
    command = recorded.pop("command", None)
    if command:
        recorded["command"] = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
    return {name: value or "–" for name, value in flattened(_joined(recorded))}


def subtitle(run: Run) -> str:
    """The data, encoder and main options of a run, in one line."""
    config, commit = run.config, run.environment.get("commit")
    about = [config["data.train"], config["model.encoder"], f"batch {config['batch_size']}"]
    about += [f"temperature {config['loss.temperature']}", *([f"commit {commit}"] if commit else [])]
    return " · ".join(about)


def tensorboard(run: Run) -> str | None:
    """The command that shows the run's metrics in TensorBoard; None if the run has no logs for it."""
    logs = run.folder.tensorboard
    return shlex.join(["tensorboard", "--logdir", str(logs)]) if logs.is_dir() else None


def device(run: Run) -> tuple[str, str]:
    """The device, and a note with precision and loss backend; both empty if not recorded."""
    recorded = run.environment
    if "device" not in recorded:
        return "", ""
    name = str(recorded["device"])
    if name.startswith("cuda") and recorded.get("gpus"):
        name = str(recorded["gpus"][0]["name"])
    ranks = recorded.get("world_size") or 1
    parts = [str(recorded[key]).split(" (")[0] for key in ("precision", "loss_backend") if recorded.get(key)]
    return (f"{ranks} × {name}" if ranks != 1 else name), " · ".join(parts)


def parameters(run: Run) -> tuple[str, str]:
    """The number of parameters, and a note that names the model; both empty if not recorded."""
    number = run.environment.get("parameters")
    if number is None:
        return "", ""
    width = float(run.config["model.width"])
    wide = f" ×{width:g}" if width != 1 else ""
    return f"{number / 1e6:.1f} M", f"{run.config['model.encoder']}{wide} with its projection head"


def _joined(value: Any) -> Any:
    """Join lists to text at any depth, with equal items counted: 8 × NVIDIA H100, 9.0."""
    if isinstance(value, dict):
        return {name: _joined(each) for name, each in value.items()}
    if isinstance(value, list):
        words = [", ".join(map(str, each.values())) if isinstance(each, dict) else str(each) for each in value]
        return ", ".join(f"{many} × {word}" if many > 1 else word for word, many in Counter(words).items())
    return "" if value is None else value
