"""Compare options: those of all ranks at the start, and those of a run with its checkpoint's when it resumes."""

import json
import os
from typing import Any

import yaml

from fastsimclr.checkpoint_format import Checkpoint
from fastsimclr.config import Config, to_yaml
from fastsimclr.distributed import World, broadcast_object, raise_on_all_ranks, run_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.training.build import Learner, check_architecture
from fastsimclr.training.images import with_absolute_paths

_OF_NODE = {"device", "data.workers", "data.cache", "data.local_cache", "data.local_cache_gb", "workers", "cache"}
"""Options that may differ between ranks, which may run on different machines. The last two are of embed."""

_OF_IMAGES = {"data.train", "data.val", "data"}
"""Paths of which only the last name is compared: images may be copied to a node, or moved before a run resumes."""

_OF_START = {"output", "resume", "resume_changed"}
"""Options that select a run or say how to resume it, and are not compared with its earlier ones."""

_OF_ARCHITECTURE = {
    *("batch_size", "optim.name"),
    *("model.encoder", "model.width", "model.stem", "model.hidden", "model.out", "model.layers"),
}
"""Options that cannot change in a run. Its architecture and its batch size are compared instead."""

_FREE = {
    *("ranks", "epochs", "steps", "max_steps", "device", "compile", "profile", "log", "stall_timeout"),
    *("checkpoint_every", "keep_every", "keep_best", "knn_every", "knn_k", "knn_images", "knn_at_start"),
    *("distributed", "health", "probe", "model.checkpoint_stages"),
    *("data.backend", "data.workers", "data.cache", "data.local_cache", "data.local_cache_gb"),
    *("data.max_bad", "loss.backend", "max_skipped", "stall_timeout", "time_limit"),
}
"""Options that a resumed run may change: its length, what it measures and writes, and how it computes the same."""


def check_ranks(options: dict[str, Any], world: World) -> None:
    """Raise UserError on all ranks, naming the options, if a rank has other options than rank 0.

    options: by name; those of a section may be in a dict.
    """
    own = _by_name(options)
    first = broadcast_object(own, world)
    differences = [
        f"{_label(name)} {_shown(value)} instead of {_shown(first.get(name))}"
        for name, value in own.items()
        if name not in _OF_NODE and not _is_same(name, value, first.get(name))
    ]
    failure = UserError(
        f"ranks: got {', '.join(differences)} on rank {world.rank}; expected the options of rank 0 on all ranks: start "
        "them with the same command"
    )
    raise_on_all_ranks(failure if differences else None, world)


def run_options(config: Config, learner: Learner, world: World) -> dict[str, Any]:
    """Return the options by name, such as "optim.lr", that a run is compared by when it resumes.

    They have the values that auto stands for where these depend on the machine or on other options.
    """
    options = _by_name(yaml.safe_load(to_yaml(with_absolute_paths(config))))
    for name in (*_OF_START, *_OF_ARCHITECTURE, "optim.lr_rule"):
        del options[name]
    recipe = learner.recipe
    options |= {"optim.lr": recipe.lr, "optim.weight_decay": recipe.weight_decay, "precision": learner.precision.name}
    return options | {"ranks": world.world_size}


def check_resumed(
    checkpoint: Checkpoint, config: Config, options: dict[str, Any], architecture: dict[str, Any], world: World
) -> None:
    """Print how the options differ from those of a checkpoint, and raise UserError on all ranks if they may not.

    options: from `run_options`. architecture: from `fastsimclr.training.build.architecture`.
    """
    run_on_all_ranks(
        lambda: _check_resumed(checkpoint, config, options, architecture) if world.is_rank_zero else None, world
    )


def _check_resumed(
    checkpoint: Checkpoint, config: Config, options: dict[str, Any], architecture: dict[str, Any]
) -> None:
    file, state = checkpoint
    check_architecture(file, state["architecture"], architecture)
    if state["batch_size"] != config.batch_size:
        raise UserError(
            f"--batch_size: got {config.batch_size}, but {file} is from a run with {state['batch_size']}; "
            "expected the same, because the schedule counts steps: use that, or --resume never"
        )
    recorded = _by_name(yaml.safe_load(state["config"]))  # has values that were measured, instead of auto
    refused = []
    for name, before in state["options"].items():
        value = options.get(name, before)
        if value in (before, recorded.get(name)):
            continue
        change = f"{_label(name)} was {_shown(before)}, is {_shown(value)}"
        is_free = _is_free(name, before, value)
        if is_free or config.resume_changed:
            print(f"resume: {change}: taken", flush=True)
        else:
            print(f"resume: {change}: refused without --resume_changed", flush=True)
            refused.append(change)
    if refused:
        raise UserError(
            f"--resume: got {file}, a checkpoint of a run with other options ({'; '.join(refused)}); expected the "
            f"same: use those, or --resume_changed to change them after step {state['step']}, or another --output"
        )


def _is_free(name: str, before: Any, value: Any) -> bool:
    if name == "data.val":
        return not isinstance(before, float) and not isinstance(value, float)  # a fraction is not trained on
    return name in _FREE or _is_same(name, before, value)


def _is_same(name: str, value: Any, other: Any) -> bool:
    if name in _OF_IMAGES and isinstance(value, str) and isinstance(other, str):
        value, other = (os.path.basename(path.rstrip("/")) for path in (value, other))
    return bool(value == other)


def _by_name(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of all sections by names such as "optim.lr"."""
    named: dict[str, Any] = {}
    for name, value in options.items():
        named |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return named


def _label(name: str) -> str:
    return name if name in ("ranks", "protocol") else f"--{name}"


def _shown(value: Any) -> str:
    """Return a value as the command line takes it."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
