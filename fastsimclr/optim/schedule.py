"""The learning rate: its peak, scaled with the batch size, and the schedule of linear warm-up and cosine decay."""

import math
from dataclasses import dataclass

from torch.optim.optimizer import Optimizer

# Learning rate and batch size of a published recipe; resolve_lr scales them to other batch sizes.
_PUBLISHED_LR: dict[str, tuple[float, int]] = {
    # SimCLR, section 2.3 and appendix B.1: .3 · B / 256 = .075 · √B = 4.8 at B=4096.
    "lars": (4.8, 4096),
    # p3i0t/SimCLR-CIFAR10 (ResNet-18): SGD, momentum .9, .3 · B / 256 = .6 at B=512.
    "sgd": (0.6, 512),
    # leftthomas/SimCLR (CIFAR-10, ResNet-50): Adam with weight decay 1e-6, thus close to AdamW; 1e-3 at B=512.
    "adamw": (1e-3, 512),
    # Liu et al., arXiv 2502.16982: the updates have the size of AdamW's, and so take its rate.
    "muon": (1e-3, 512),
}
# MoCo v3 (arXiv 2104.02057), section 4.1: AdamW for ViTs, 1.5e-4 · B / 256 = 2.4e-3 at B=4096. ConvNeXt V2 (arXiv
# 2301.00808) pre-trains with the same rate.
_PUBLISHED_TRANSFORMER_LR = (2.4e-3, 4096)


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up to `peak`, then cosine decay to 0 (SimCLR, section 2.3).

    step: index of the step, from 0 (steps, not epochs). warmup_steps: from 0 (no warm-up) to total_steps.
    The first warmup_steps steps use peak · (step + 1) / warmup_steps. The cosine starts at `peak` in step warmup_steps
    and reaches 0 in step total_steps, one after the last; later steps use 0. google-research/simclr has
    peak · step / warmup_steps, whose first step has a rate of 0 and so wastes a batch; its cosine is the same.
    Raises ValueError for a negative step or rate, or inconsistent numbers of steps.
    """
    if step < 0:
        raise ValueError(f"step is {step}, expected the index of a step, 0 or more")
    if not 0 <= peak < math.inf:
        raise ValueError(f"peak is {peak}, expected a finite learning rate >= 0")
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps} and total_steps {total_steps}, expected 0 <= warmup_steps <= total_steps "
            "and total_steps >= 1: shorten the warm-up or train longer"
        )
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= total_steps:
        return 0.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def resolve_lr(rule: str, batch_size: int, optimizer: str, *, transformer: bool = False) -> float:
    """Return the peak learning rate for a global batch of B images by "linear" or "sqrt" scaling (SimCLR, app. B.1).

    "linear" is proportional to the batch size, "sqrt" to its square root; both equal the published rate at its batch
    size. lars: .3 · B / 256 or .075 · √B (better below B=1024); sgd: .3 · B / 256 or .6 · √(B / 512); adamw and
    muon: 1e-3 · B / 512 or 1e-3 · √(B / 512).
    transformer: for adamw, use the rate of MoCo v3 for ViTs, 1.5e-4 · B / 256 or 2.4e-3 · √(B / 4096).
    Raises ValueError for an unknown rule or optimizer or a batch size below 1.
    """
    if optimizer not in _PUBLISHED_LR:
        raise ValueError(f"optimizer is {optimizer!r}, expected one of {', '.join(_PUBLISHED_LR)}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected the number of images per step, at least 1")
    lr, published_batch_size = _PUBLISHED_LR[optimizer]
    if transformer and optimizer == "adamw":
        lr, published_batch_size = _PUBLISHED_TRANSFORMER_LR
    if rule == "linear":
        return lr * batch_size / published_batch_size
    if rule == "sqrt":
        return lr * math.sqrt(batch_size / published_batch_size)
    raise ValueError(f"rule is {rule!r}, expected 'linear' or 'sqrt', or set the learning rate to a number")


@dataclass(frozen=True)
class LRSchedule:
    """Learning-rate schedule of a run: linear warm-up to `peak`, then cosine decay to 0."""

    peak: float
    warmup_steps: int
    total_steps: int

    @classmethod
    def over_epochs(cls, peak: float, epochs: float, steps_per_epoch: int, warmup_epochs: float) -> "LRSchedule":
        """Return the schedule over `epochs` epochs; the warm-up is limited to a tenth of all steps."""
        total_steps = round(epochs * steps_per_epoch)
        return cls(peak, min(round(warmup_epochs * steps_per_epoch), total_steps // 10), total_steps)

    def apply(self, optimizer: Optimizer, step: int) -> float:
        """Set the learning rate of step `step` (from 0) in every param group, and return it."""
        lr = learning_rate(step, peak=self.peak, warmup_steps=self.warmup_steps, total_steps=self.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr
