"""Who computes the NT-Xent loss in bench_nt_xent.py: ours, the dense loss as everyone writes it, other packages'."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.sizes import SMALL
from fastsimclr._extension import why_unavailable
from fastsimclr.loss import nt_xent

TEMPERATURE = 0.1
BF16_LARGEST_ON_CPU = 1024  # without bf16 units autocast is 20 times slower than float32 there
PML_LARGEST = 512  # it lists each positive with each negative pair: 134 million floats at 512, M^3
FLEX_BLOCK = 128

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """loss: of (z1, z2), both (N, D) float32.

    bound: the largest relative error of the loss and of the gradients at which it still is the same function, computed
        in the precision that it claims; None where it computes in less than it is given: then its errors are recorded.
    not_captured: why no CUDA graph of it is tried; "" where it is.
    ours: whether an error of it is one of the benchmark; others are left out, with the reason.
    compiled: by torch.compile at its first call, which takes longer than all else in a small run.
    other_work: what it computes instead of NT-Xent, "" for NT-Xent. It is a yardstick then, not a rival, and unchecked.
    """

    loss: Loss
    bound: tuple[float, float] | None = None
    not_captured: str = ""
    ours: bool = False
    compiled: bool = False
    other_work: str = ""


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
    """lse - s_pos, the lse by FlexAttention in bf16: it gives the lse, and passes its gradient on; its output is not
    wanted, so the values are zeros of the least width. Compiled whole, with the normalisation."""
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

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=1).bfloat16()  # (M, D)
        values = z.new_zeros(1, 1, views, 16)
        _, aux = flex_attention(
            z[None, None],
            z[None, None],
            values,
            block_mask=mask,
            scale=1 / TEMPERATURE,
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        positive = (z.float() * z.float().roll(views // 2, 0)).sum(1) / TEMPERATURE
        return (aux.lse[0, 0] - positive).mean()

    return loss


def inf_cl_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """NT-Xent made of Inf-CL's kernel, which is for CLIP's loss: of two sets, with nothing masked.

    Given one set twice, with each row its own label, it returns e_i = log sum_j exp(s_ij) - s_ii with j = i in the sum.
    Taking that term out again, lse_i = s_ii + log(exp(e_i) - 1), is NT-Xent on paper; in numbers it cancels where a row
    resembles few others, and its products are TF32. So it is timed, and its errors are recorded.
    """
    from inf_cl import cal_flash_loss  # type: ignore[import-not-found]

    z = F.normalize(torch.cat([z1, z2]), dim=1)
    itself = torch.arange(len(z), device=z.device)
    e = cal_flash_loss(z, z, itself, scale=1 / TEMPERATURE, head_dim=z.shape[1])
    positive = (z * z.roll(len(z1), 0)).sum(1) / TEMPERATURE
    return (1 / TEMPERATURE + torch.expm1(e).log() - positive).mean()


def siglip_kernel_loss(device: torch.device) -> Loss:
    """siglip-kernel's sigmoid loss of as many pairs: 2N rows against their positives, in bf16, its fastest path.

    Raises ImportError where siglip_kernel is not installed.
    """
    from siglip_kernel import fused_siglip_loss  # type: ignore[import-not-found]

    log_temperature = torch.tensor(1 / TEMPERATURE, device=device).log()
    bias = torch.tensor(-10.0, device=device)

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=1).bfloat16()
        result: Tensor = fused_siglip_loss(z, z.roll(len(z1), 0), log_temperature, bias)
        return result

    return loss


def our_losses(device: torch.device) -> tuple[dict[str, Contender], dict[str, str]]:
    def ours(backend: str, precision: str, bound: tuple[float, float]) -> Contender:
        def loss(z1: Tensor, z2: Tensor) -> Tensor:
            return nt_xent(z1, z2, TEMPERATURE, backend=backend, precision=precision)

        return Contender(loss, bound, ours=True)

    found: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    # On a CPU its sources can run in emulation, which is for tests.
    if why := "it is a CUDA kernel" if device.type == "cpu" else why_unavailable(device):
        missing["fused"] = why
    else:
        found["fused, medium"] = ours("fused", "medium", (1e-3, 2e-2))
        found["fused"] = ours("fused", "highest", (1e-4, 1e-4))
    found["tiled"] = ours("tiled", "highest", (1e-5, 1e-4))
    found["tiled, medium"] = ours("tiled", "medium", (1e-3, 2e-2))
    return found, missing


def contenders(views: int, width: int, device: torch.device) -> tuple[dict[str, Contender], dict[str, str]]:
    """The losses by name, the one that the others are compared with first; and of those that are not here, why.

    Nothing is called or compiled yet: one that fails at its first call is for the caller to leave out.
    """
    torch.compiler.reset()  # else the graphs of all sizes stay
    found, missing = our_losses(device)
    found["dense"] = Contender(dense, (1e-5, 1e-4))
    found["dense, torch.compile"] = Contender(torch.compile(dense, dynamic=False), (1e-5, 1e-4), compiled=True)
    on_gpu = device.type == "cuda"
    if on_gpu or views <= BF16_LARGEST_ON_CPU:
        found["dense, bf16"] = Contender(dense_bf16)
    else:
        missing["dense, bf16"] = f"on a CPU up to M={BF16_LARGEST_ON_CPU} only"
    if on_gpu:
        found["dense, bf16, torch.compile"] = Contender(torch.compile(dense_bf16, dynamic=False), compiled=True)

    try:
        from lightly.loss import NTXentLoss as LightlyLoss

        waits = "it waits for the GPU: a boolean mask as an index"
        found["lightly"] = Contender(LightlyLoss(temperature=TEMPERATURE), (1e-5, 1e-4), not_captured=waits)
    except ImportError as error:
        missing["lightly"] = str(error)
    try:
        from pytorch_metric_learning.losses import NTXentLoss as MetricLearningLoss
        from pytorch_metric_learning.losses import SelfSupervisedLoss

        if views <= PML_LARGEST:
            loss = SelfSupervisedLoss(MetricLearningLoss(temperature=TEMPERATURE))
            found["pytorch-metric-learning"] = Contender(loss, (1e-5, 1e-4), not_captured="it waits for the GPU")
        else:
            missing["pytorch-metric-learning"] = f"takes M^3 memory: up to M={PML_LARGEST} only"
    except ImportError as error:
        missing["pytorch-metric-learning"] = str(error)

    power_of_two = width & (width - 1) == 0 and width >= 16
    if not on_gpu:
        missing["FlexAttention, bf16"] = "has no backward on a CPU"
    elif views % FLEX_BLOCK or not power_of_two:
        missing["FlexAttention, bf16"] = f"here only for views in blocks of {FLEX_BLOCK}, widths 16, 32, 64, ..."
    else:
        flex = torch.compile(flex_attention_loss(views, device), dynamic=False)
        found["FlexAttention, bf16"] = Contender(flex, compiled=True)
    if not on_gpu:
        missing["Inf-CL, TF32"] = "is a kernel in Triton, for GPUs"
    elif importlib.util.find_spec("inf_cl") is None:
        missing["Inf-CL, TF32"] = "not installed (pip install inf_cl)"
    elif not power_of_two or width > 256:
        missing["Inf-CL, TF32"] = "for widths of 16, 32, 64, 128 and 256 only"
    else:
        found["Inf-CL, TF32"] = Contender(inf_cl_loss)
    if not on_gpu:
        missing["siglip-kernel, bf16"] = "is made of kernels in Triton, for GPUs"
    else:
        try:
            found["siglip-kernel, bf16"] = Contender(
                siglip_kernel_loss(device), other_work="other work: the sigmoid loss of as many pairs"
            )
        except ImportError as error:
            missing["siglip-kernel, bf16"] = str(error)
    if SMALL:
        missing |= {name: "is compiled: not in a small run" for name, each in found.items() if each.compiled}
        found = {name: each for name, each in found.items() if not each.compiled}
    return found, missing
