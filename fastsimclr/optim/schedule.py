"""How large the learning rate is: its peak from the batch size, then warm-up and cosine over the steps."""

import math
from dataclasses import dataclass

from torch.optim.optimizer import Optimizer

# What one published recipe uses, and the batch size it uses it at; the rules below carry it over to others.
_PUBLISHED_LR: dict[str, tuple[float, int]] = {
    # SimCLR, section 2.3 and appendix B.1: .3 · B / 256 = .075 · √B = 4.8 at B=4096.
    "lars": (4.8, 4096),
    # p3i0t/SimCLR-CIFAR10 (ResNet-18): SGD, momentum .9, .3 · B / 256 = .6 at B=512.
    "sgd": (0.6, 512),
    # leftthomas/SimCLR (CIFAR-10, ResNet-50): Adam with decay 1e-6, so hardly another thing than AdamW, 1e-3 at B=512.
    "adamw": (1e-3, 512),
}


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of a step: linear warm-up to `peak`, then one cosine to 0 without restarts (SimCLR, section 2.3).

    step: steps done before this one (0 for the first), not epochs. warmup_steps: 0 for none, at most total_steps.
    The first warmup_steps steps take peak · (step + 1) / warmup_steps; the cosine starts at `peak` in step warmup_steps
    and would reach 0 in step total_steps, one after the last; 0 from there on. google-research/simclr has
    peak · step / warmup_steps, whose first step has a rate of 0 and so wastes a batch; its cosine is the same.
    Raises ValueError for a negative step or rate, or lengths that contradict each other.
    """
    if step < 0:
        raise ValueError(f"step is {step}, expected the number of steps done so far, 0 or more")
    if not 0 <= peak < math.inf:
        raise ValueError(f"peak is {peak}, expected a finite learning rate >= 0")
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps} and total_steps {total_steps}, expected 0 <= warmup_steps <= total_steps "
            "and total_steps >= 1: shorten the warm-up or train for longer"
        )
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= total_steps:
        return 0.0
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def resolve_lr(rule: str, batch_size: int, optimizer: str) -> float:
    """Peak learning rate for a global batch of B source images, by "linear" or "sqrt" scaling (SimCLR, B.1).

    "linear" is proportional to the batch size, "sqrt" to its square root; both give the published rate at the batch
    size that it was published for. lars: .3 · B / 256 or .075 · √B (better below B=1024); sgd: .3 · B / 256 or
    .6 · √(B / 512); adamw: 1e-3 · B / 512 or 1e-3 · √(B / 512).
    Raises ValueError for an unknown rule or optimizer or a batch size below 1.
    """
    if optimizer not in _PUBLISHED_LR:
        raise ValueError(f"optimizer is {optimizer!r}, expected one of {', '.join(_PUBLISHED_LR)}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected the number of source images in a step, at least 1")
    lr, published_batch_size = _PUBLISHED_LR[optimizer]
    if rule == "linear":
        return lr * batch_size / published_batch_size
    if rule == "sqrt":
        return lr * math.sqrt(batch_size / published_batch_size)
    raise ValueError(f"rule is {rule!r}, expected 'linear' or 'sqrt', or give the learning rate itself as a number")


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate of every step of a training: linear warm-up to `peak`, then one cosine to 0."""

    peak: float
    warmup_steps: int
    total_steps: int

    @classmethod
    def over_epochs(cls, peak: float, epochs: int, steps_per_epoch: int, warmup_epochs: float) -> "LRSchedule":
        """The schedule of so many epochs, at most a tenth of which is warm-up."""
        total_steps = epochs * steps_per_epoch
        return cls(peak, min(round(warmup_epochs * steps_per_epoch), total_steps // 10), total_steps)

    def apply(self, optimizer: Optimizer, step: int) -> float:
        """Set the rate of the step that comes after `step` steps, and return it."""
        lr = learning_rate(step, peak=self.peak, warmup_steps=self.warmup_steps, total_steps=self.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr
