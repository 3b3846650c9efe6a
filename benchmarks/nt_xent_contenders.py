"""The NT-Xent losses of bench_nt_xent.py: ours, the dense loss as everyone writes it, other packages'."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite import NO_TIME_TO_COMPILE
from fastsimclr._extension import why_unavailable
from fastsimclr.loss import nt_xent

TEMPERATURE = 0.1
BF16_LARGEST_ON_CPU = 1024  # without bf16 units autocast is 20 times slower than float32
PML_LARGEST = 512  # it lists each positive with each negative pair: 134 million floats at 512, M^3
EXACT = (1e-5, 1e-4)

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """loss: of (z1, z2), both (N, D) float32. bound: the largest relative errors of the loss and of the gradients; None
    where it computes in less than its inputs' precision: then its errors are recorded."""

    loss: Loss
    bound: tuple[float, float] | None = None
    ours: bool = False


def dense(z1: Tensor, z2: Tensor) -> Tensor:
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = z @ z.T / TEMPERATURE
    s = s.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=s.device), -torch.inf)
    return F.cross_entropy(s, torch.arange(2 * n, device=s.device).roll(n))


def dense_bf16(z1: Tensor, z2: Tensor) -> Tensor:
    """Under autocast products and logits are bf16; logits of 10 then lie 0.06 apart, and the loss is rough."""
    with torch.autocast(z1.device.type, dtype=torch.bfloat16):
        return dense(z1, z2)


def our_losses(device: torch.device) -> tuple[dict[str, Contender], dict[str, str]]:
    def ours(backend: str, precision: str, bound: tuple[float, float]) -> Contender:
        def loss(z1: Tensor, z2: Tensor) -> Tensor:
            return nt_xent(z1, z2, TEMPERATURE, backend=backend, precision=precision)

        return Contender(loss, bound, ours=True)

    tiled = {"tiled": ours("tiled", "highest", EXACT), "tiled, medium": ours("tiled", "medium", (1e-3, 2e-2))}
    if why := "it is a CUDA kernel" if device.type == "cpu" else why_unavailable(device):
        return tiled, {"fused": why}
    fused = {
        "fused, medium": ours("fused", "medium", (1e-3, 2e-2)),
        "fused": ours("fused", "highest", (1e-4, 1e-4)),
    }
    return fused | tiled, {}


def contenders(num_views: int, device: torch.device, *, compiling: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """The losses by name, the one that the others are compared with first; and why others are left out."""
    torch.compiler.reset()  # else the graphs of all sizes stay
    found, missing = our_losses(device)
    found["dense"] = Contender(dense, EXACT)
    if device.type == "cuda" or num_views <= BF16_LARGEST_ON_CPU:
        found["dense, bf16"] = Contender(dense_bf16)
    else:
        missing["dense, bf16"] = f"on a CPU up to M={BF16_LARGEST_ON_CPU} only"
    try:
        from lightly.loss import NTXentLoss as LightlyLoss

        found["lightly"] = Contender(LightlyLoss(temperature=TEMPERATURE), EXACT)
    except ImportError as error:
        missing["lightly"] = str(error)
    try:
        from pytorch_metric_learning.losses import NTXentLoss as MetricLearningLoss
        from pytorch_metric_learning.losses import SelfSupervisedLoss

        if num_views > PML_LARGEST:
            raise ImportError(f"takes M^3 memory: up to M={PML_LARGEST} only")
        loss = SelfSupervisedLoss(MetricLearningLoss(temperature=TEMPERATURE))
        found["pytorch-metric-learning"] = Contender(loss, EXACT)
    except ImportError as error:
        missing["pytorch-metric-learning"] = str(error)
    if compiling:
        found["dense, torch.compile"] = Contender(torch.compile(dense, dynamic=False), EXACT)
    else:
        missing["dense, torch.compile"] = NO_TIME_TO_COMPILE
    return found, missing
