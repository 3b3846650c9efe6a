"""LARS on ResNet-50's parameters: ours, a loop over the tensors, and what timm and lightly have.

    python -m pytest benchmarks/bench_optimizer.py --benchmark-json=benchmarks/results/lars-DEVICE.json

In a fresh process glibc hands the pages of every freed temporary back to the system, and a step written as a loop is
several times slower than in a training run, whose activations raise that threshold: so `settle_heap` comes first.
"""

from collections.abc import Callable

import pytest
import torch
from timm.optim import Lars as TimmLars
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torchvision.models import resnet18, resnet50

from benchmarks.memory import peak_mib, settle_heap
from benchmarks.suite import DEVICE, SMALL, Check, Suite
from fastsimclr.optim import LARS, is_norm_or_bias

LR, WEIGHT_DECAY = 0.3, 1e-6
MODEL, MODEL_NAME = (resnet18, "ResNet-18") if SMALL else (resnet50, "ResNet-50")
# Of the distance that the weights moved: float32 rounding, and wd·‖w‖ and eps that timm and lightly add to ‖grad‖.
BOUND = 1e-3

Build = Callable[[list[Tensor]], Optimizer]


class LoopLARS(Optimizer):
    """LARS as it is usually written (barlowtwins, moco-v3): tensor by tensor, no host synchronization; lr inside."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            g = p.grad
            if not is_norm_or_bias(p):
                g = g.add(p, alpha=WEIGHT_DECAY)
                w_norm, g_norm = torch.norm(p), torch.norm(g)
                one = torch.ones_like(w_norm)
                g = g.mul(torch.where(w_norm > 0, torch.where(g_norm > 0, 0.001 * w_norm / g_norm, one), one))
            state = self.state[p]
            if not state:
                state["velocity"] = torch.zeros_like(p)
            state["velocity"].mul_(0.9).add_(g, alpha=LR)
            p.sub_(state["velocity"])


def decay_groups(params: list[Tensor]) -> list[dict[str, object]]:
    """Two groups: timm and lightly neither decay nor adapt a group of weight_decay=0."""
    return [
        {"params": [p for p in params if not is_norm_or_bias(p)], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if is_norm_or_bias(p)], "weight_decay": 0.0},
    ]


def contenders() -> tuple[dict[str, Build], dict[str, str]]:
    """The optimizers by name, ours first; and of those that are not available, why."""
    found: dict[str, Build] = {
        "fastsimclr": lambda params: LARS(params, lr=LR, weight_decay=WEIGHT_DECAY),
        "loop over tensors": LoopLARS,
        "timm (multi-tensor)": lambda params: TimmLars(decay_groups(params), lr=LR, momentum=0.9, foreach=True),
        "timm (default)": lambda params: TimmLars(decay_groups(params), lr=LR, momentum=0.9),
    }
    try:
        from lightly.utils.lars import LARS as LightlyLARS
    except ImportError as error:
        return found, {"lightly": str(error)}
    found["lightly"] = lambda params: LightlyLARS(decay_groups(params), lr=LR, momentum=0.9)
    return found, {}


def prepare(build: Build, start: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], Optimizer]:
    """Copies of the weights, with the gradients that all share, and their optimizer."""
    params = [p.clone().requires_grad_() for p in start]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params, build(params)


def after_steps(build: Build, start: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    params, optimizer = prepare(build, start, grads)
    for _ in range(5):
        optimizer.step()
    return params


@torch.no_grad()
def largest_error(ours: list[Tensor], theirs: list[Tensor], start: list[Tensor]) -> float:
    """The largest distance of any tensor from ours, over the distance that ours moved."""
    apart = [(p - q).norm() / (p - w0).norm() for p, q, w0 in zip(ours, theirs, start, strict=True)]
    return float(torch.stack(apart).max())


@pytest.mark.benchmark(group=f"LARS step, {MODEL_NAME}")
def test_lars_step(suite: Suite) -> None:
    torch.manual_seed(0)
    settle_heap()
    start = [p.detach().to(DEVICE) for p in MODEL().parameters()]
    # ‖grad‖ of 1e-2·‖w‖ or so; the optimizers share the gradients, none may write to them.
    grads = [1e-3 * torch.randn_like(p) for p in start]
    before = [g.clone() for g in grads]
    found, missing = contenders()
    steps = {name: prepare(build, start, grads)[1].step for name, build in found.items()}
    sizes = {
        "tensors": len(start),
        "adapted_tensors": sum(not is_norm_or_bias(p) for p in start),
        "parameters": sum(p.numel() for p in start),
    }
    suite.interleave(steps, sizes=sizes, rounds=2 if SMALL else 20)
    peaks = {name: peak_mib(step) for name, step in steps.items()}  # the first step allocated the momenta
    assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
    moved = {name: after_steps(build, start, grads) for name, build in found.items()}
    ours, *rivals = moved
    checks = {
        name: Check("weights, of the way gone", largest_error(moved[ours], moved[name], start), BOUND)
        for name in rivals
    }
    suite.record(peak_mib=peaks, checks=checks, missing=missing)
