"""Optimizers and the learning-rate schedule for pre-training."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsimclr.optim.lars import LARS, is_norm_or_bias
from fastsimclr.optim.muon import Muon
from fastsimclr.optim.recipe import Recipe, choose_optimizer, choose_recipe, excluded_from_decay, is_transformer
from fastsimclr.optim.schedule import LRSchedule, learning_rate, resolve_lr
from fastsimclr.optim.sharded_sgd import ShardedSGD
from fastsimclr.sharding import is_sharded

__all__ = [
    "LARS",
    "LRSchedule",
    "Muon",
    "Recipe",
    "build_optimizer",
    "choose_optimizer",
    "choose_recipe",
    "excluded_from_decay",
    "is_norm_or_bias",
    "is_transformer",
    "learning_rate",
    "resolve_lr",
]


def build_optimizer(
    name: str,
    params: Iterable[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    *,
    exclude: Callable[[Tensor], bool] = is_norm_or_bias,
    nesterov: bool = False,
) -> Optimizer:
    """Build the optimizer "lars", "sgd", "adamw" or "muon".

    params: parameters; those with requires_grad=False are ignored.
    momentum: for "adamw", Adam's β₁. nesterov: only for "sgd".
    exclude: function of a parameter: whether it is excluded from weight decay, from LARS's adaptation and from Muon.
        "sgd", "adamw" and "muon" have the excluded ones in a second param group.
    Raises ValueError for an unknown name, or if no parameter requires a gradient.
    """
    trainable = [p for p in params if p.requires_grad]
    if not trainable:
        raise ValueError("got no parameter with requires_grad=True, expected at least one: is the whole model frozen?")
    if name == "lars":
        return LARS(trainable, lr, momentum=momentum, weight_decay=weight_decay, exclude=exclude)
    if name == "muon":
        return Muon(trainable, lr, momentum=momentum, weight_decay=weight_decay, exclude=exclude)
    groups = [
        {"params": [p for p in trainable if not exclude(p)], "weight_decay": weight_decay},
        {"params": [p for p in trainable if exclude(p)], "weight_decay": 0.0},
    ]
    fused = trainable[0].is_cuda  # one launch, and the training step can skip it without waiting for the GPU
    if name == "sgd":
        kind = torch.optim.SGD
        if is_sharded(trainable[0]):
            kind, fused = ShardedSGD, True
        sgd = kind(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
        for p in trainable if fused and momentum else []:
            # Otherwise SGD allocates the momentum in its first step, and leaves it uninitialized if that is skipped.
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if name == "adamw":
        fused |= trainable[0].device.type == "cpu"  # one pass over memory instead of one per operation
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=fused)
    raise ValueError(f"optimizer is {name!r}, expected 'lars', 'sgd', 'adamw' or 'muon'")
