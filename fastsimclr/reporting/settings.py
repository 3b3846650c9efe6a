"""How a run was set up: its configuration, its environment, and in which of them runs differ."""

import dataclasses
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from fastsimclr.config import Config, parse
from fastsimclr.models import SimCLR, encoder, projector
from fastsimclr.reporting.run_record import Run, flattened

OWN = "output"
"""An option that differs from run to run by what it is."""


def differing(found: Sequence[dict[str, str]]) -> list[str]:
    """The names whose values are not the same in all."""
    names = dict.fromkeys(name for each in found for name in each if name != OWN)
    return [name for name in names if len({each.get(name) for each in found}) > 1]


def changed(run: Run) -> list[str]:
    """The options of a run that are not the defaults."""
    return differing([run.config, dict(flattened(dataclasses.asdict(Config()))) | {OWN: ""}])


def environment(run: Run) -> dict[str, str]:
    """What the run ran on, if it has kept it; lists as words."""
    kept = dict(run.environment)
    command = kept.pop("command", None)
    if command:
        kept["command"] = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
    return {name: value or "–" for name, value in flattened(_worded(kept))}


def subtitle(run: Run) -> str:
    """What the run trained, and on what."""
    config, commit = run.config, run.environment.get("commit")
    about = [config["data.train"], config["model.encoder"], f"batch {config['batch_size']}"]
    about += [f"temperature {config['loss.temperature']}", *([f"commit {commit}"] if commit else [])]
    return " · ".join(about)


def device(run: Run) -> tuple[str, str]:
    """What the run ran on, and how; both empty if it has not kept it."""
    kept = run.environment
    if "device" not in kept:
        return "", ""
    name = str(kept["device"])
    if name.startswith("cuda") and kept.get("gpus"):
        name = str(kept["gpus"][0]["name"])
    ranks = kept.get("world_size") or 1
    parts = [str(kept[key]).split(" (")[0] for key in ("precision", "loss_backend") if kept.get(key)]
    return (f"{ranks} × {name}" if ranks != 1 else name), " · ".join(parts)


def parameters(run: Run) -> tuple[str, str]:
    """How many parameters the run's model has, and of what; both empty if its options don't say."""
    try:
        config, _ = parse([f"--config={run.folder.config}"])
        model = config.model
        with torch.device("meta"):  # sizes alone
            body = encoder(model.encoder, model.width, model.stem, image_size=config.data.image_size)
            head = projector(body.out_features, model.hidden, model.out, model.layers)
    except ValueError:  # another version's options
        return "", ""
    whole = sum(parameter.numel() for parameter in SimCLR(body, head).parameters())
    wide = f" ×{model.width:g}" if model.width != 1 else ""
    return f"{whole / 1e6:.1f} M", f"{model.encoder}{wide} with its projection head"


def _worded(value: Any) -> Any:
    """Lists as words, at any depth: eight GPUs that are alike as 8 × NVIDIA H100, 9.0."""
    if isinstance(value, dict):
        return {name: _worded(each) for name, each in value.items()}
    if isinstance(value, list):
        words = [", ".join(map(str, each.values())) if isinstance(each, dict) else str(each) for each in value]
        return ", ".join(f"{many} × {word}" if many > 1 else word for word, many in Counter(words).items())
    return "" if value is None else value
