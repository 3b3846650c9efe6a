"""LARS on ResNet-50's parameters: ours, a loop over the tensors, and what timm and lightly have.

    python -m pytest benchmarks/bench_optimizer.py --benchmark-json=benchmarks/results/lars-DEVICE.json

On a CPU a step is bound by memory traffic, of which the multi-tensor form saves little, and by what a temporary costs.
In a fresh process glibc hands the pages of every freed temporary back to the system, and a step written as a loop is
several times slower than after the first activation of a training run, which raises that threshold to its highest. Only
the latter is a fair figure, so `settle_heap` comes first. On a GPU it is launches that a step is bound by.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timm.optim import Lars as TimmLars
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torchvision.models import resnet50

from benchmarks.interleaved import interleave
from fastsimclr.optim import LARS, is_norm_or_bias

LR, WEIGHT_DECAY = 0.3, 1e-6


class LoopLARS(Optimizer):
    """LARS as it is usually written (barlowtwins, moco-v3): tensor by tensor, no host synchronisation; lr inside."""

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


def settle_heap() -> None:
    """Free a block just under glibc's largest threshold (32 MiB), as training does: glibc keeps 64 MiB from then on."""
    torch.ones(31 * 2**18)


def decay_groups(params: list[Tensor]) -> list[dict[str, object]]:
    """Two groups: timm and lightly neither decay nor adapt a group of weight_decay=0."""
    return [
        {"params": [p for p in params if not is_norm_or_bias(p)], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if is_norm_or_bias(p)], "weight_decay": 0.0},
    ]


def contenders() -> dict[str, Callable[[list[Tensor]], Optimizer]]:
    found: dict[str, Callable[[list[Tensor]], Optimizer]] = {
        "fastsimclr": lambda params: LARS(params, lr=LR, weight_decay=WEIGHT_DECAY),
        "loop over tensors": LoopLARS,
        "timm (multi-tensor)": lambda params: TimmLars(decay_groups(params), lr=LR, momentum=0.9, foreach=True),
        "timm (default)": lambda params: TimmLars(decay_groups(params), lr=LR, momentum=0.9),
    }
    try:
        from lightly.utils.lars import LARS as LightlyLARS

        found["lightly"] = lambda params: LightlyLARS(decay_groups(params), lr=LR, momentum=0.9)
    except ImportError:
        pass  # a development extra; what is missing is missing in the table and in the JSON's list of packages
    return found


@pytest.mark.benchmark(group="LARS step, ResNet-50")
def test_lars_step(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    settle_heap()
    start = [p.detach().to(device) for p in resnet50().parameters()]
    # ‖grad‖ of 1e-2·‖w‖ or so; the optimizers share the gradients, none may write to them.
    grads = [1e-3 * torch.randn_like(p) for p in start]
    before = [g.clone() for g in grads]

    params: dict[str, list[Tensor]] = {}
    optimizers: dict[str, Optimizer] = {}
    for name, build in contenders().items():
        params[name] = [p.clone().requires_grad_() for p in start]
        for p, g in zip(params[name], grads, strict=True):
            p.grad = g
        optimizers[name] = build(params[name])

    benchmark.extra_info.update(
        device=device,
        tensors=len(start),
        adapted_tensors=sum(not is_norm_or_bias(p) for p in start),
        parameters=sum(p.numel() for p in start),
    )
    timing = interleave(
        benchmark,
        {name: optimizer.step for name, optimizer in optimizers.items()},
        synchronize=torch.cuda.synchronize if device == "cuda" else lambda: None,
    )
    with capsys.disabled():
        print(f"\nLARS step, ResNet-50, {len(start)} tensors, {device}: {timing}")

    assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
    ours = params["fastsimclr"]
    for name in optimizers:
        for w0, p, q in zip(start, ours, params[name], strict=True):
            # 1e-3 of the way gone: roundings in float32, and wd·‖w‖ and eps that timm and lightly add to ‖grad‖.
            assert (p - q).norm() <= 1e-3 * (p - w0).norm(), f"{name} and fastsimclr disagree on {tuple(p.shape)}"
