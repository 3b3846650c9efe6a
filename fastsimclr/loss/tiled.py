"""The NT-Xent loss in PyTorch, computed over tiles of the similarity matrix that fit in the cache: O(M D) memory.

Notation, with 2n local rows and M rows on all ranks: z^ = z/|z|, s_ij = z^_i.z^_j / temperature,

    W_i    = sum over the negatives j of i (all but i and its positive) of exp(s_ij)
    x_i    = log W_i - s_i,pos
    loss_i = log(1 + exp(x_i)) lse_i = log(W_i + exp(s_i,pos))     q_i = sigmoid(x_i)
    loss_i = x_i               lse_i = log W_i                     q_i = 1               (decoupled)

With g_i the incoming gradient of loss_i, p_ij = exp(s_ij - lse_i) and j over the negatives of i:

    dz^_i  = 1/temperature * [ sum_j (g_i p_ij + g_j p_ji) z^_j - (g_i q_i + g_pos q_pos) z^_pos ]

q_i replaces 1 - p_pos, which cancels near convergence. Since s is symmetric, p_ji needs only lse_j. With z^ and lse
gathered in the forward pass, each rank computes its own rows exactly and the backward pass needs no communication.

exp(s_ij) is computed as exp2, on rows scaled by sqrt(log2(e) / temperature). On a CPU exp2 is four times faster.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.distributed import all_gather_rows, gather_sizes, group_name, group_of
from fastsimclr.loss.autograd_modes import define_modes, refuse_transforms
from fastsimclr.loss.reference import NORM_EPS, row_norms
from fastsimclr.loss.tiles import (
    LOG2_E,
    Pairs,
    RowLosses,
    exp_is_safe,
    gather_factors,
    gradients,
    log_sums,
    matmul_precision,
    scale_of,
)


def nt_xent_tiled(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor,
    group: dist.ProcessGroup | None,
    mean: bool,
    decoupled: bool,
    precision: str,
    temperature_value: float | None,
) -> Tensor:
    """Arguments and result as in `fastsimclr.nt_xent`. temperature_value: the temperature, if known on the CPU."""
    refuse_transforms("tiled")
    return tiled_forward(z1, z2, temperature, group_name(group), mean, decoupled, precision, temperature_value)[0]


@torch.library.custom_op("fastsimclr::tiled_forward", mutates_args=())
def tiled_forward(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor,
    group: str,
    mean: bool,
    decoupled: bool,
    precision: str,
    temperature_value: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and the tensors for the backward pass.

    These are the scaled rows (2n, D), their norms (2n,), the scaled rows of all ranks (M, D; empty without a group),
    [lse in bits, q] of all ranks (2, M), and the number of rows on each rank (world_size,).
    """
    n = z1.shape[0]
    dtype = torch.promote_types(z1.dtype, torch.float32)
    with torch.autocast(z1.device.type, enabled=False), matmul_precision(precision, z1.device):
        z = torch.cat([z1, z2]).to(dtype)
        norm = row_norms(z)
        z = z.mul_((scale_of(temperature, dtype) / norm)[:, None])
        sizes, offset, all_z = [2 * n], 0, z
        if group:
            sizes = gather_sizes(2 * n, group_of(group), z.device)
            offset = sum(sizes[: dist.get_rank(group_of(group))])
            all_z = gather_factors(z, sizes, group_of(group), precision)
        rows = sum(sizes)

        safe = exp_is_safe(temperature, temperature_value, rows, dtype)
        log_w, _ = log_sums(z, all_z, Pairs(offset, n), exp_is_safe=safe)
        positive = (z[:n] * z[n:]).sum(1).repeat(2)
        x = (log_w - positive) / LOG2_E
        losses = x if decoupled else -F.logsigmoid(-x)
        lse = log_w if decoupled else positive + losses * LOG2_E
        q = torch.ones_like(x) if decoupled else x.sigmoid()
        stats = torch.stack([lse, q])
        if group:
            stats = all_gather_rows(stats.T, sizes, group_of(group)).T.contiguous()
        loss = losses.sum() * (len(sizes) / rows) if mean else losses
        return loss, z, norm, all_z if group else z.new_empty(0, z.shape[1]), stats, torch.tensor(sizes)


@tiled_forward.register_fake
def _(z1, z2, temperature, group, mean, decoupled, precision, temperature_value):  # type: ignore[no-untyped-def]
    n, d = z1.shape
    dtype = torch.promote_types(z1.dtype, torch.float32)
    rows = torch.library.get_ctx().new_dynamic_size() if group else 2 * n
    ranks = dist.get_world_size(group_of(group)) if group else 1
    return (
        z1.new_empty((() if mean else (2 * n,)), dtype=dtype),
        z1.new_empty((2 * n, d), dtype=dtype),
        z1.new_empty((2 * n,), dtype=dtype),
        z1.new_empty((rows if group else 0, d), dtype=dtype),
        z1.new_empty((2, rows), dtype=dtype),
        torch.empty(ranks, dtype=torch.int64),
    )


@torch.library.custom_op("fastsimclr::tiled_backward", mutates_args=())
def tiled_backward(
    dloss: Tensor,
    z: Tensor,
    norm: Tensor,
    all_z: Tensor,
    stats: Tensor,
    sizes: Tensor,
    temperature: Tensor,
    group: str,
    precision: str,
    temperature_value: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the projections (2n, D) and the temperature (). Other arguments as in tiled_forward."""
    n = z.shape[0] // 2
    rows = stats.shape[1]
    with torch.autocast(z.device.type, enabled=False), matmul_precision(precision, z.device):
        offset, g = 0, dloss
        if group:
            offset = int(sizes[: dist.get_rank(group_of(group))].sum())
        else:
            all_z = z
        if dloss.ndim == 0:
            g = (dloss * (len(sizes) / rows)).expand(rows)
        elif group:  # reduction="none": the only case in which the backward pass communicates
            g = all_gather_rows(dloss, sizes.tolist(), group_of(group))
        lse, q = stats
        local = slice(offset, offset + 2 * n)
        # Scaled to a maximum of 1, and back at the end: with the mean's factor 1/M, g / 2^lse would be subnormal.
        g_scale = g.abs().amax().clamp_min_(torch.finfo(z.dtype).tiny)
        g = g / g_scale

        safe = exp_is_safe(temperature, temperature_value, rows, z.dtype)
        of_rows = RowLosses(lse[local], g[local])
        dz, _ = gradients(z, all_z, Pairs(offset, n), of_rows, RowLosses(lse, g), exp_is_safe=safe)
        positive_weight = (g * q)[local]
        positive_weight = positive_weight + positive_weight.roll(n)
        # The gradient with respect to z^, up to the factors applied at the end.
        dz.addcmul_(z.roll(n, dims=0), positive_weight[:, None], value=-1)

        scale = scale_of(temperature, z.dtype)
        z_dot_dz = (z * dz).sum(1)
        dtemperature = z_dot_dz.sum() * (-0.5 / LOG2_E / temperature.to(z.dtype)) * g_scale
        # As in F.normalize, which divides by a constant below its eps.
        radial = torch.where(norm > NORM_EPS, z_dot_dz / scale**2, 0.0)
        dz.addcmul_(z, radial[:, None], value=-1)
        dz.mul_((g_scale / (scale * temperature.to(z.dtype) * norm))[:, None])
        return dz, dtemperature


@tiled_backward.register_fake
def _(dloss, z, norm, all_z, stats, sizes, temperature, group, precision, temperature_value):  # type: ignore[no-untyped-def]
    return torch.empty_like(z), z.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z1, _, temperature, ctx.group, _, _, ctx.precision, ctx.temperature_value = inputs
    ctx.dtype = z1.dtype
    ctx.save_for_backward(*output[1:], temperature)
    # The saved outputs are not marked as non-differentiable, so that a second derivative goes through tiled_backward,
    # which has no derivative, and raises. If marked, it would silently be zero. Their own gradients are None.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:  # gradcheck calls it without any gradient
        return (None,) * 8
    refuse_transforms("tiled")
    z, norm, all_z, stats, sizes, temperature = ctx.saved_tensors
    dz, dtemperature = tiled_backward(
        dloss, z, norm, all_z, stats, sizes, temperature, ctx.group, ctx.precision, ctx.temperature_value
    )
    dz1, dz2 = dz.to(ctx.dtype).chunk(2)
    return dz1, dz2, dtemperature.to(temperature), None, None, None, None, None


tiled_forward.register_autograd(_backward, setup_context=_setup_context)
define_modes("tiled", tiled_forward, tiled_backward)
