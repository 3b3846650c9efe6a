"""Encoders as they are after training, checkpoints of runs, and the metrics that a run logged."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from checkpoints import make_state
from torch import Tensor, nn

from fastsimclr import SimCLR, projector
from fastsimclr.checkpoint_format import write_checkpoint
from fastsimclr.config import parse, to_yaml
from fastsimclr.models import Backbone, Encoder
from fastsimclr.run_folder import RunFolder

M = TypeVar("M", bound=nn.Module)


def randomize_norms(module: M, seed: int = 0) -> M:
    """Give all batch normalizations random statistics and weights, as after training, and switch to eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            assert part.num_batches_tracked is not None
            part.running_mean.normal_(0, 0.1, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            part.weight.data.uniform_(0.2, 0.8, generator=generator)
            part.bias.data.normal_(0, 0.1, generator=generator)
            part.num_batches_tracked.fill_(1000)
    return module.eval()


def images(*shape: int) -> Tensor:
    """Return random images of this shape (N, 3, H, W), always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(module: nn.Module, side: int = 64) -> Tensor:
    """Return the module's outputs (2, features) for two fixed random images."""
    h: Tensor = module(images(2, 3, side, side + 8))
    return h.flatten(1)


def save_run(folder: Path, encoder: Encoder | Backbone, *options: str) -> Path:
    """Write a run folder with a checkpoint as train writes it at step 7; return it. `options` are options of train."""
    spec = encoder.spec
    model = {"encoder": spec.name, "width": spec.width, "stem": spec.stem}
    config = parse(["--data.train=photos", *(f"--model.{name}={value}" for name, value in model.items()), *options])
    architecture = {"encoder": asdict(spec), "hidden": 8, "out": 8, "layers": 2, "optimizer": "lars"}
    weights = SimCLR(encoder, projector(encoder.out_features, hidden=8, out=8)).state_dict()
    checkpoint = RunFolder(folder).checkpoint
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(make_state(architecture=architecture, model=weights, config=to_yaml(config)), checkpoint)
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl, but for heartbeats."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "phase" not in record]


def steps(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's training steps."""
    return [record for record in metrics(run) if "loss" in record]
