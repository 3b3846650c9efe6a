"""The NT-Xent losses of bench_nt_xent.py: fastsimclr, the usual dense implementation, and other packages."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite import NO_TIME_TO_COMPILE
from fastsimclr._extension import why_unavailable
from fastsimclr.loss import nt_xent

TEMPERATURE = 0.1
BF16_MAX_VIEWS_ON_CPU = 1024  # without bf16 units autocast is 20 times slower than float32
PML_MAX_VIEWS = 512  # it lists each positive with each negative pair: M^3 floats, 134 million at 512 views
EXACT = (1e-5, 1e-4)

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One implementation of the loss.

    loss: function of z1 and z2, both (N, D) float32. bound: bounds of the relative errors of the loss and of the
    gradients; None if it computes at lower precision than its inputs, in which case its errors are only recorded.
    """

    loss: Loss
    bound: tuple[float, float] | None = None
    is_fastsimclr: bool = False


def dense(z1: Tensor, z2: Tensor) -> Tensor:
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = z @ z.T / TEMPERATURE
    s = s.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=s.device), -torch.inf)
    return F.cross_entropy(s, torch.arange(2 * n, device=s.device).roll(n))


def dense_bf16(z1: Tensor, z2: Tensor) -> Tensor:
    """Under autocast, products and logits are bf16: logits near 10 are rounded to steps of 0.06."""
    with torch.autocast(z1.device.type, dtype=torch.bfloat16):
        return dense(z1, z2)


def fastsimclr_losses(device: torch.device) -> tuple[dict[str, Contender], dict[str, str]]:
    def contender(backend: str, precision: str, bound: tuple[float, float]) -> Contender:
        def loss(z1: Tensor, z2: Tensor) -> Tensor:
            return nt_xent(z1, z2, TEMPERATURE, backend=backend, precision=precision)

        return Contender(loss, bound, is_fastsimclr=True)

    tiled = {"tiled": contender("tiled", "highest", EXACT), "tiled, medium": contender("tiled", "medium", (1e-3, 2e-2))}
    if why := "CUDA kernel, needs a GPU" if device.type == "cpu" else why_unavailable(device):
        return tiled, {"fused": why}
    fused = {
        "fused, medium": contender("fused", "medium", (1e-3, 2e-2)),
        "fused": contender("fused", "highest", (1e-4, 1e-4)),
    }
    return fused | tiled, {}


def contenders(num_views: int, device: torch.device, *, compiling: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the losses by name, and the reasons why others are left out. All are compared with the first."""
    torch.compiler.reset()  # frees the graphs of other sizes
    found, missing = fastsimclr_losses(device)
    found["dense"] = Contender(dense, EXACT)
    if device.type == "cuda" or num_views <= BF16_MAX_VIEWS_ON_CPU:
        found["dense, bf16"] = Contender(dense_bf16)
    else:
        missing["dense, bf16"] = f"on a CPU only up to {BF16_MAX_VIEWS_ON_CPU} views"
    try:
        from lightly.loss import NTXentLoss as LightlyLoss

        found["lightly"] = Contender(LightlyLoss(temperature=TEMPERATURE), EXACT)
    except ImportError as error:
        missing["lightly"] = str(error)
    try:
        from pytorch_metric_learning.losses import NTXentLoss as MetricLearningLoss
        from pytorch_metric_learning.losses import SelfSupervisedLoss

        if num_views > PML_MAX_VIEWS:
            raise ImportError(f"memory cubic in the number of views: only up to {PML_MAX_VIEWS} views")
        loss = SelfSupervisedLoss(MetricLearningLoss(temperature=TEMPERATURE))
        found["pytorch-metric-learning"] = Contender(loss, EXACT)
    except ImportError as error:
        missing["pytorch-metric-learning"] = str(error)
    if compiling:
        found["dense, torch.compile"] = Contender(torch.compile(dense, dynamic=False), EXACT)
    else:
        missing["dense, torch.compile"] = NO_TIME_TO_COMPILE
    return found, missing
