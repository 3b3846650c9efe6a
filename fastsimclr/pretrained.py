"""Encoders out of files: a run's checkpoint, our exports, and other projects' checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastsimclr import checkpoint
from fastsimclr.models import Encoder, encoder
from fastsimclr.views import Views


@dataclass(frozen=True)
class Pretrained:
    """An encoder, and what its file says of it."""

    encoder: Encoder
    """In eval mode, float32, on the CPU."""
    views: Views | None
    """The recipe that it was trained by, if the file says it."""
    origin: str
    """What wrote the file."""
    config: dict[str, Any] | None = None
    """The run's whole configuration, if the file has it."""


def load_encoder(path: str | Path) -> Encoder:
    """The encoder in a file of ours: normalised images (N, 3, H, W) to representations h (N, encoder.out_features)."""
    return open_pretrained(path).encoder


def open_pretrained(path: str | Path) -> Pretrained:
    """The encoder in `path`, with what the file says of it."""
    state = checkpoint.load(Path(path))
    built = state["architecture"]
    model = encoder(built["encoder"], built["width"], built["stem"])
    prefix = "encoder."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)})
    config = yaml.safe_load(state["config"])
    return Pretrained(model.float().eval(), Views.of(config["data"]), f"fastsimclr run, step {state['step']}", config)
