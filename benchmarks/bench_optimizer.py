"""LARS on the parameters of ResNet-50: fastsimclr, a loop over the tensors, timm and lightly.

    python -m pytest benchmarks/bench_optimizer.py --benchmark-json=benchmarks/results/lars-DEVICE.json

In a fresh process, glibc returns the pages of every freed temporary to the system, which makes a step written as a loop
several times slower than in a training run, whose activations raise glibc's threshold. Therefore `settle_heap` is
called first.
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
# Relative to the update of the weights: float32 rounding, and wd·‖w‖ and eps, which timm and lightly add to ‖grad‖.
BOUND = 1e-3

Build = Callable[[list[Tensor]], Optimizer]


class LoopLARS(Optimizer):
    """LARS as in barlowtwins and moco-v3: one tensor at a time, no host synchronization; lr inside the velocity."""

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
    """Return two groups: timm and lightly neither decay nor adapt a group with weight_decay=0."""
    return [
        {"params": [p for p in params if not is_norm_or_bias(p)], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if is_norm_or_bias(p)], "weight_decay": 0.0},
    ]


def contenders() -> tuple[dict[str, Build], dict[str, str]]:
    """Return the optimizers by name, fastsimclr first, and the reasons why others are not available."""
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
    """Return copies of the weights, with the shared gradients, and their optimizer."""
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
def largest_error(expected: list[Tensor], got: list[Tensor], start: list[Tensor]) -> float:
    """Return the largest error of a tensor, relative to the norm of its update by fastsimclr."""
    errors = [(p - q).norm() / (p - w0).norm() for p, q, w0 in zip(expected, got, start, strict=True)]
    return float(torch.stack(errors).max())


@pytest.mark.benchmark(group=f"LARS step of {MODEL_NAME}")
def test_lars_step(suite: Suite) -> None:
    torch.manual_seed(0)
    settle_heap()
    start = [p.detach().to(DEVICE) for p in MODEL().parameters()]
    # ‖grad‖ is about 1e-2·‖w‖. The optimizers share the gradients; none may write to them.
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
    updated = {name: after_steps(build, start, grads) for name, build in found.items()}
    first, *others = updated
    what = "error of the weights relative to their update"
    checks = {name: Check(what, largest_error(updated[first], updated[name], start), BOUND) for name in others}
    suite.record(peak_mib=peaks, checks=checks, missing=missing, readme_task=f"LARS step of {MODEL_NAME}")
