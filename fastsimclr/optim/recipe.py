"""The optimizer that suits an encoder, with published hyperparameters."""

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fastsimclr.optim.lars import is_norm_or_bias
from fastsimclr.optim.schedule import resolve_lr

_EMBEDDING = re.compile(r"pos_?emb|position|rel_pos|(class|cls|dist|reg|register|mask)_tokens?\b")


@dataclass(frozen=True)
class Recipe:
    """An optimizer and its hyperparameters, with the reason for each that was chosen automatically."""

    optimizer: str
    lr: float
    """Peak learning rate."""
    weight_decay: float
    why_optimizer: str
    why_lr: str
    why_weight_decay: str

    def __str__(self) -> str:
        return (
            f"{self.optimizer}{self.why_optimizer}, lr {self.lr:.4g}{self.why_lr}, "
            f"weight decay {self.weight_decay:g}{self.why_weight_decay}"
        )


def choose_recipe(
    encoder: nn.Module,
    optimizer: str,
    lr: float | Literal["auto"],
    lr_rule: str,
    weight_decay: float | Literal["auto"],
    batch_size: int,
) -> Recipe:
    """Return the optimizer and the hyperparameters for an encoder. Each may be "auto".

    optimizer: auto is "adamw" for transformers and "lars" for convolutional networks, see `is_transformer`.
    lr, lr_rule: as for `resolve_lr`.
    weight_decay: auto is 0.1 for AdamW on transformers, as in MoCo v3, otherwise SimCLR's 1e-6.
    """
    transformer = is_transformer(encoder)[0]
    optimizer, why_optimizer = choose_optimizer(optimizer, encoder)
    why_lr = why_weight_decay = ""
    as_in_moco = transformer and optimizer == "adamw"
    if lr_rule == "auto":
        lr_rule = "linear" if as_in_moco else "sqrt"
    if lr == "auto":
        lr = resolve_lr(lr_rule, batch_size, optimizer, transformer=transformer)
        why_lr = f" (auto: {lr_rule} rule{' of MoCo v3' if as_in_moco else ''} at batch {batch_size})"
    if weight_decay == "auto":
        weight_decay, why_weight_decay = (0.1, " (auto: MoCo v3)") if as_in_moco else (1e-6, " (auto: SimCLR)")
    return Recipe(optimizer, lr, weight_decay, why_optimizer, why_lr, why_weight_decay)


def choose_optimizer(optimizer: str, encoder: nn.Module) -> tuple[str, str]:
    """Return the optimizer, and the reason if `optimizer` is "auto"."""
    if optimizer != "auto":
        return optimizer, ""
    transformer, why = is_transformer(encoder)
    return "adamw" if transformer else "lars", f" (auto: {why})"


def is_transformer(encoder: nn.Module) -> tuple[bool, str]:
    """Return whether an encoder trains like a transformer, and why.

    Those with layer normalization or attention do, and those without batch normalization: ViTs, ConvNeXt, hybrids.
    """
    modules = list(encoder.modules())
    if any(isinstance(module, nn.LayerNorm) for module in modules):
        return True, "encoder with LayerNorm"
    if any("attention" in type(module).__name__.lower() for module in modules):
        return True, "encoder with attention"
    if not any(isinstance(module, _BatchNorm) for module in modules):
        return True, "encoder without BatchNorm"
    return False, "convolutional encoder with BatchNorm"


def excluded_from_decay(model: nn.Module) -> set[Tensor]:
    """Return the parameters that are neither decayed nor adapted by LARS.

    Those are norms, biases, and scales such as LayerScale's (C, 1, 1); position embeddings, class tokens and tables of
    relative position biases, by name; and those that a timm model lists in `no_weight_decay`.
    """
    excluded: set[Tensor] = set()
    for path, module in model.named_modules():
        listed = module.no_weight_decay() if callable(getattr(module, "no_weight_decay", None)) else ()
        excluded |= {parameter for name, parameter in module.named_parameters() if name in listed}
        is_linear = isinstance(module, nn.Linear | _ConvNd)
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = is_linear and name == "weight"
            is_scale = sum(length > 1 for length in parameter.shape) <= 1
            if is_norm_or_bias(parameter) or (not is_weight and (is_scale or _EMBEDDING.search(f"{path}.{name}"))):
                excluded.add(parameter)
    return excluded
