"""The NT-Xent loss in plain PyTorch, over tiles of the similarity matrix that stay in the cache: O(M D) memory.

Notation, for the 2n local rows and the M rows of all ranks: z^ = z/|z|, s_ij = z^_i.z^_j / temperature,

    W_i    = sum over j that is neither i nor i's positive of exp(s_ij)          the negatives
    x_i    = log W_i - s_i,pos
    loss_i = log(1 + exp(x_i)) lse_i = log(W_i + exp(s_i,pos))     q_i = sigmoid(x_i)
    loss_i = x_i               lse_i = log W_i                     q_i = 1               (decoupled)

with g_i the gradient that arrives at loss_i, p_ij = exp(s_ij - lse_i), j over the negatives of i:

    dz^_i  = 1/temperature * [ sum_j (g_i p_ij + g_j p_ji) z^_j - (g_i q_i + g_pos q_pos) z^_pos ]

Never 1 - p_pos: near convergence it cancels, q does not. Since s is symmetric, p_ji takes lse_j alone: with z^ and
lse gathered in the forward, each rank has its own rows exactly and exchanges nothing in the backward.

exp is exp2 of rows scaled by sqrt(log2(e) / temperature): on a CPU exp2 is four times faster than exp.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.distributed import all_gather_rows, gather_sizes, group_name, group_of

LOG2_E = math.log2(math.e)
NORM_EPS = 1e-12  # of torch.nn.functional.normalize


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
    """Arguments and result as in `fastsimclr.nt_xent`. temperature_value: the temperature if it is known on the CPU."""
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
    """The loss, and what the backward needs: scaled rows (2n, D), their norms (2n,), and of all ranks the scaled rows
    (M, D; none in a process alone), [lse in bits, q] (2, M) and how many rows each has (W,)."""
    n = z1.shape[0]
    dtype = torch.promote_types(z1.dtype, torch.float32)
    with torch.autocast(z1.device.type, enabled=False), _matmul_precision(precision, z1.device):
        z = torch.cat([z1, z2]).to(dtype)
        norm = torch.linalg.vector_norm(z, dim=1).clamp_min_(NORM_EPS)
        z = z.mul_((_scale(temperature, dtype) / norm)[:, None])
        sizes, offset, everyone = [2 * n], 0, z
        if group:
            sizes = gather_sizes(2 * n, group_of(group), z.device)
            offset = sum(sizes[: dist.get_rank(group_of(group))])
            everyone = all_gather_rows(z, sizes, group_of(group))
        rows = sum(sizes)

        if _exp_is_safe(temperature, temperature_value, rows, dtype):
            log_w = _negative_sums(z, everyone, offset).log2_()
        else:
            log_w = _log_negative_sums(z, everyone, offset)
        positive = (z[:n] * z[n:]).sum(1).repeat(2)
        x = (log_w - positive) / LOG2_E
        losses = x if decoupled else -F.logsigmoid(-x)
        lse = log_w if decoupled else positive + losses * LOG2_E
        q = torch.ones_like(x) if decoupled else x.sigmoid()
        stats = torch.stack([lse, q])
        if group:
            stats = all_gather_rows(stats.T, sizes, group_of(group)).T.contiguous()
        loss = losses.sum() * (len(sizes) / rows) if mean else losses
        return loss, z, norm, everyone if group else z.new_empty(0, z.shape[1]), stats, torch.tensor(sizes)


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
    everyone: Tensor,
    stats: Tensor,
    sizes: Tensor,
    temperature: Tensor,
    group: str,
    precision: str,
    temperature_value: float | None,
) -> tuple[Tensor, Tensor]:
    """Gradients (2n, D) of the views' projections, and () of the temperature. The rest as tiled_forward gave it."""
    n = z.shape[0] // 2
    rows = stats.shape[1]
    with torch.autocast(z.device.type, enabled=False), _matmul_precision(precision, z.device):
        offset, g = 0, dloss
        if group:
            offset = int(sizes[: dist.get_rank(group_of(group))].sum())
        else:
            everyone = z
        if dloss.ndim == 0:
            g = (dloss * (len(sizes) / rows)).expand(rows)
        elif group:  # each row's own weight: the one case in which the backward communicates
            g = all_gather_rows(dloss, sizes.tolist(), group_of(group))
        lse, q = stats
        mine = slice(offset, offset + 2 * n)
        # Of size 1, and the size comes back at the end: a mean's 1/M would push g / 2^lse below the normal numbers.
        size = g.abs().amax().clamp_min_(torch.finfo(z.dtype).tiny)
        g = g / size

        if _exp_is_safe(temperature, temperature_value, rows, z.dtype):
            dz = _negatives_gradient(z, everyone, offset, weights=g * torch.exp2(-lse))
        else:
            dz = _negatives_gradient(z, everyone, offset, weights=g, lse=lse)
        pull = (g * q)[mine]
        pull = pull + pull.roll(n)
        dz.addcmul_(z.roll(n, dims=0), pull[:, None], value=-1)  # d/d z^, but for factors: see the last line

        scale = _scale(temperature, z.dtype)
        along = (z * dz).sum(1)
        dtemperature = along.sum() * (-0.5 / LOG2_E / temperature.to(z.dtype)) * size
        along = torch.where(norm > NORM_EPS, along / scale**2, 0.0)  # as F.normalize: no projection below its eps
        dz.addcmul_(z, along[:, None], value=-1)
        dz.mul_((size / (scale * temperature.to(z.dtype) * norm))[:, None])
        return dz, dtemperature


@tiled_backward.register_fake
def _(dloss, z, norm, everyone, stats, sizes, temperature, group, precision, temperature_value):  # type: ignore[no-untyped-def]
    return torch.empty_like(z), z.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z1, _, temperature, ctx.group, _, _, ctx.precision, ctx.temperature_value = inputs
    ctx.dtype = z1.dtype
    ctx.save_for_backward(*output[1:], temperature)
    # The saved outputs are not marked as non-differentiable: so a second derivative, which would go through them, meets
    # tiled_backward, which has no derivative, and raises; marked, it would silently be zero. Their gradients are None.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:  # gradcheck asks for the gradient of nothing
        return (None,) * 8
    z, norm, everyone, stats, sizes, temperature = ctx.saved_tensors
    dz, dtemperature = tiled_backward(
        dloss, z, norm, everyone, stats, sizes, temperature, ctx.group, ctx.precision, ctx.temperature_value
    )
    dz1, dz2 = dz.to(ctx.dtype).chunk(2)
    return dz1, dz2, dtemperature.to(temperature), None, None, None, None, None


tiled_forward.register_autograd(_backward, setup_context=_setup_context)


def _negative_sums(z: Tensor, everyone: Tensor, offset: int) -> Tensor:
    """W (2n,): sums of 2^(z_i.z_j) over the negatives of each local row i, which is row offset + i of everyone's."""
    w = z.new_zeros(z.shape[0])
    symmetric = everyone is z
    for row, a, column, b, tile in _tiles(z, everyone, symmetric):
        tile.exp2_()
        _fill_pairs(tile, row, column, z.shape[0], offset, 0.0)
        w[row : row + len(a)] += tile.sum(1)
        if symmetric and column > row:
            w[column : column + len(b)] += tile.sum(0)
    return w


def _log_negative_sums(z: Tensor, everyone: Tensor, offset: int) -> Tensor:
    """log2 of _negative_sums with a running maximum of each row: for temperatures at which 2^s overflows."""
    maximum = z.new_full((z.shape[0],), torch.finfo(z.dtype).min)
    w = torch.zeros_like(maximum)
    for row, a, column, _, tile in _tiles(z, everyone, symmetric=False):
        _fill_pairs(tile, row, column, z.shape[0], offset, -torch.inf)
        rows = slice(row, row + len(a))
        new = torch.maximum(maximum[rows], tile.amax(1))
        w[rows] = w[rows] * torch.exp2(maximum[rows] - new) + tile.sub_(new[:, None]).exp2_().sum(1)
        maximum[rows] = new
    return w.log2_() + maximum


def _negatives_gradient(
    z: Tensor, everyone: Tensor, offset: int, *, weights: Tensor, lse: Tensor | None = None
) -> Tensor:
    """sum over the negatives j of i of (g_i p_ij + g_j p_ji) z_j, for each local row i: (2n, D).

    weights (M,): g_i / 2^lse_i, so that one exponential serves p_ij and p_ji; with `lse` (for temperatures at which
    2^s overflows): g_i, and the exponentials are of s_ij - lse_i and s_ij - lse_j.
    """
    dz = torch.zeros_like(z)
    symmetric = everyone is z
    buffer = z.new_empty(_tile_size(z.device) ** 2)
    for row, a, column, b, tile in _tiles(z, everyone, symmetric):
        rows = slice(offset + row, offset + row + len(a))
        columns = slice(column, column + len(b))
        other = buffer[: tile.numel()].view_as(tile)
        if lse is None:
            torch.add(weights[rows, None], weights[columns], out=other)
            tile.exp2_().mul_(other)
        else:
            torch.sub(tile, lse[columns], out=other).exp2_().mul_(weights[columns])
            tile.sub_(lse[rows, None]).exp2_().mul_(weights[rows, None]).add_(other)
        _fill_pairs(tile, row, column, z.shape[0], offset, 0.0)
        dz[row : row + len(a)].addmm_(tile, b)
        if symmetric and column > row:
            dz[columns].addmm_(tile.T, a)
    return dz


def _tiles(z: Tensor, everyone: Tensor, symmetric: bool) -> Iterator[tuple[int, Tensor, int, Tensor, Tensor]]:
    """(row, a, column, b, a @ b.T) for each tile of z @ everyone.T; only those on and above the diagonal if symmetric.

    a and b are the rows of z and of everyone that start at row and column. All products share one buffer.
    """
    size = _tile_size(z.device)
    buffer = z.new_empty(size * size)
    for row in range(0, z.shape[0], size):
        a = z[row : row + size]
        for column in range(row if symmetric else 0, everyone.shape[0], size):
            b = everyone[column : column + size]
            tile = buffer[: len(a) * len(b)].view(len(a), len(b))
            yield row, a, column, b, torch.mm(a, b.T, out=tile)


def _tile_size(device: torch.device) -> int:
    # CPU: 1 MiB of float32 a tile, which the two passes over it find in a core's L2. GPU: enough work for a launch.
    return 512 if device.type == "cpu" else 4096


def _fill_pairs(tile: Tensor, row: int, column: int, local_rows: int, offset: int, value: float) -> None:
    """Write `value` where a row of the tile meets itself or its positive."""
    n = local_rows // 2
    for first, last, shift in ((0, 2 * n, 0), (0, n, n), (n, 2 * n, -n)):
        start = offset + shift - column  # local row i meets its partner in the tile's column start + i
        low = max(first, row, -start)
        high = min(last, row + tile.shape[0], tile.shape[1] - start)
        if low < high:
            tile[low - row : high - row, start + low : start + high].diagonal().fill_(value)


def _scale(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of this length have z_i.z_j = s_ij in bits: 2^(z_i.z_j) = exp(s_ij)."""
    return (LOG2_E / temperature.to(dtype)).sqrt()


def _exp_is_safe(temperature: Tensor, value: float | None, rows: int, dtype: torch.dtype) -> bool:
    """Whether sums of `rows` exponentials of up to 1/temperature, and their inverses, are finite and normal numbers.

    |s| <= 1/temperature, as rows are unit. `value`: the temperature if it is known; where it lives on a GPU it is not
    waited for: then the answer is no, which is right for any value.
    """
    if value is None:
        if temperature.device.type != "cpu":
            return False
        value = float(temperature)
    largest = -math.log(torch.finfo(dtype).tiny)  # 87.3 in float32
    return 1.01 / value + math.log(rows) < largest  # 1.01: rounding of rows to unit length, bf16's included


@contextmanager
def _matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Full float32 products for "highest", whatever the caller's setting; bf16 (CPU) or TF32 (GPU) for "medium"."""
    matmul: Any
    every_operator: Any
    if device.type == "cuda":  # PyTorch keeps the setting of all of CUDA's operators under cudnn
        matmul, every_operator, medium = torch.backends.cuda.matmul, torch.backends.cudnn, "tf32"
    else:
        mkldnn: Any = torch.backends.mkldnn  # whose `matmul` the type checker does not know
        matmul, every_operator, medium = mkldnn.matmul, mkldnn, "bf16"
    before = matmul.fp32_precision
    # matmul's value may be its own or inherited ("none": that of every operator). If the two agree, inherit afterwards.
    inherited = before == every_operator.fp32_precision
    matmul.fp32_precision = "ieee" if precision == "highest" else medium
    try:
        yield
    finally:
        matmul.fp32_precision = "none" if inherited else before
