"""What a run records of itself in its folder: its configuration, images and environment."""

import json
import time
from typing import Any, Protocol

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastsimclr.config import to_yaml
from fastsimclr.data import ViewLoader
from fastsimclr.data.sources import Source
from fastsimclr.environment import commit, examine
from fastsimclr.optim import Recipe
from fastsimclr.precision import Precision
from fastsimclr.run_folder import write_text
from fastsimclr.training.callbacks import TrainerInterface
from fastsimclr.training.estimate import Estimate
from fastsimclr.training.images import record_images, with_absolute_paths


class RecordedTrainer(TrainerInterface, Protocol):
    """The parts of `Trainer` that are recorded."""

    command: list[str]
    source: Source
    precision: Precision
    recipe: Recipe
    loss_backend: str
    loader: ViewLoader


def record_run(trainer: RecordedTrainer, estimate: Estimate | None) -> None:
    """Write config.yaml, environment.json and the list of images. Only rank zero calls it.

    estimate: of a step, if one was made.
    """
    folder = trainer.folder
    write_text(folder.config, to_yaml(with_absolute_paths(trainer.config)))
    record_images(trainer.source, folder)
    write_text(folder.environment, json.dumps(_environment(trainer, estimate), indent=2) + "\n")


def _environment(trainer: RecordedTrainer, estimate: Estimate | None) -> dict[str, Any]:
    """The environment of the run, as of its latest start, and what `fastsimclr plan` needs to know of its model."""
    return examine() | {
        "commit": commit(),
        "command": trainer.command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": trainer.world.world_size,
        "device": str(trainer.world.device),
        "threads": torch.get_num_threads(),
        "images": len(trainer.source),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "batch_norms": sum(isinstance(module, _BatchNorm) for module in trainer.model.modules()),
        "activation_mib_per_image": estimate and round(estimate.activation_bytes / 2**20, 4),
        "optimizer": trainer.recipe.optimizer,
        "precision": trainer.precision.why,
        "loss_backend": trainer.loss_backend,
        "views_backend": trainer.loader.backend,
    }
