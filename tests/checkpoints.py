"""A small state that checkpoint_format.CONTENTS describes."""

from typing import Any

import torch

from fastsimclr.checkpoint_format import FORMAT


def make_state(**changes: Any) -> dict[str, Any]:
    """Return the state of a checkpoint with a seeded weight, and some of its keys changed."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    encoder = {"name": "resnet18", "width": 1, "stem": "small", "image_size": 16, "channels": 3}
    return {
        "format": FORMAT,
        "step": 7,
        "batch_size": 16,
        "architecture": {"encoder": encoder, "hidden": None, "out": 128, "layers": 2, "optimizer": "lars"},
        "model": {"weight": weight},
        "optimizer": {"state": {0: {"momentum_buffer": -weight}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "grad_scaler": {},
        "data": {"images": 80, "seed": 0, "epoch": 1, "position": 32},
        "skipped_images": {"seen": 112, "bad": [(3, "a/3.jpg", "damaged")]},
        "skipped_steps": {"total": 2, "in_a_row": 0},
        "callbacks": [("KeepCheckpoints", {"best_accuracy": 0.5, "best_epoch": 1})],
        "probe": {},
        "untrained_knn": None,
        "unfinished_epoch": None,
        "config": "epochs: 2\n",
        "options": {"optim.lr": 0.1},
    } | changes
