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
FLEX_BLOCK = 128
EXACT = (1e-5, 1e-4)

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """loss: of (z1, z2), both (N, D) float32.

    bound: the largest relative error of the loss and of the gradients at which it still is the same function, computed
        in the precision that it claims; None where it computes in less than its inputs': then its errors are recorded.
    not_captured: why no CUDA graph of it is tried; "" where it is.
    ours: whether its error fails the benchmark; others are left out, with the reason.
    """

    loss: Loss
    bound: tuple[float, float] | None = None
    not_captured: str = ""
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


def flex_attention_loss(views: int, device: torch.device) -> Loss:
    """lse - s_pos, the lse by FlexAttention in bf16: it returns the lse and passes its gradient on. Its output is not
    used, so the values are zeros of the smallest width. Compiled whole, with the normalization."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    # Made by hand: create_block_mask holds a matrix of views x views. Only blocks on the diagonal need the mask.
    blocks = views // FLEX_BLOCK
    index = torch.arange(blocks, dtype=torch.int32, device=device)
    mask = BlockMask.from_kv_blocks(
        kv_num_blocks=torch.ones_like(index).view(1, 1, blocks),
        kv_indices=index.view(1, 1, blocks, 1).expand(1, 1, blocks, blocks).contiguous(),
        full_kv_num_blocks=torch.full_like(index, blocks - 1).view(1, 1, blocks),
        full_kv_indices=((index[:, None] + 1 + index) % blocks)[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda batch, head, row, column: row != column,
        seq_lengths=(views, views),
    )
    options = {"block_mask": mask, "scale": 1 / TEMPERATURE, "return_aux": AuxRequest(lse=True)}

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=1).bfloat16()  # (M, D)
        _, aux = flex_attention(z[None, None], z[None, None], z.new_zeros(1, 1, views, 16), **options)
        positive = (z.float() * z.float().roll(views // 2, 0)).sum(1) / TEMPERATURE
        return (aux.lse[0, 0] - positive).mean()

    return loss


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


def contenders(
    views: int, width: int, device: torch.device, *, compiling: bool
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The losses by name, the one that the others are compared with first; and of those that are left out, why.

    Nothing is called or compiled yet: one that fails at its first call is for the caller to leave out.
    """
    torch.compiler.reset()  # else the graphs of all sizes stay
    on_gpu = device.type == "cuda"
    found, missing = our_losses(device)
    found["dense"] = Contender(dense, EXACT)
    if on_gpu or views <= BF16_LARGEST_ON_CPU:
        found["dense, bf16"] = Contender(dense_bf16)
    else:
        missing["dense, bf16"] = f"on a CPU up to M={BF16_LARGEST_ON_CPU} only"
    try:
        from lightly.loss import NTXentLoss as LightlyLoss

        waits = "it waits for the GPU: a boolean mask as an index"
        found["lightly"] = Contender(LightlyLoss(temperature=TEMPERATURE), EXACT, not_captured=waits)
    except ImportError as error:
        missing["lightly"] = str(error)
    try:
        from pytorch_metric_learning.losses import NTXentLoss as MetricLearningLoss
        from pytorch_metric_learning.losses import SelfSupervisedLoss

        if views > PML_LARGEST:
            raise ImportError(f"takes M^3 memory: up to M={PML_LARGEST} only")
        loss = SelfSupervisedLoss(MetricLearningLoss(temperature=TEMPERATURE))
        found["pytorch-metric-learning"] = Contender(loss, EXACT, not_captured="it waits for the GPU")
    except ImportError as error:
        missing["pytorch-metric-learning"] = str(error)

    compiled: dict[str, tuple[Loss, tuple[float, float] | None]] = {"dense, torch.compile": (dense, EXACT)}
    if on_gpu:
        compiled["dense, bf16, torch.compile"] = (dense_bf16, None)
    if not on_gpu:
        missing["FlexAttention, bf16"] = "has no backward on a CPU"
    elif views % FLEX_BLOCK or width & (width - 1) or width < 16:
        missing["FlexAttention, bf16"] = f"here only for views in blocks of {FLEX_BLOCK}, widths 16, 32, 64, ..."
    else:
        compiled["FlexAttention, bf16"] = (flex_attention_loss(views, device), None)
    for name, (function, bound) in compiled.items():
        if compiling:
            found[name] = Contender(torch.compile(function, dynamic=False), bound)
        else:
            missing[name] = NO_TIME_TO_COMPILE
    return found, missing
