"""Optimizers and the learning-rate schedule for pre-training."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsimclr.optim.lars import LARS, is_norm_or_bias
from fastsimclr.optim.schedule import LRSchedule, learning_rate, resolve_lr

__all__ = ["LARS", "LRSchedule", "build_optimizer", "is_norm_or_bias", "learning_rate", "resolve_lr"]


def build_optimizer(
    name: str, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, *, nesterov: bool = False
) -> Optimizer:
    """Build the optimizer "lars", "sgd" or "adamw", with norm and bias parameters excluded from weight decay.

    params: parameters; those with requires_grad=False are ignored.
    momentum: for "adamw", Adam's β₁. nesterov: only for "sgd".
    "lars" also excludes norm and bias parameters from adaptation; "sgd" and "adamw" have them in a second param group.
    Raises ValueError for an unknown name, or if no parameter requires a gradient.
    """
    trainable = [p for p in params if p.requires_grad]
    if not trainable:
        raise ValueError("got no parameter with requires_grad=True, expected at least one: is the whole model frozen?")
    if name == "lars":
        return LARS(trainable, lr, momentum=momentum, weight_decay=weight_decay)
    groups = [
        {"params": [p for p in trainable if not is_norm_or_bias(p)], "weight_decay": weight_decay},
        {"params": [p for p in trainable if is_norm_or_bias(p)], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))
    raise ValueError(f"optimizer is {name!r}, expected 'lars', 'sgd' or 'adamw'")
