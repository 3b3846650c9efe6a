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

import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.distributed import all_gather_rows, gather_sizes, group_name, group_of
from fastsimclr.loss.autograd_modes import define_modes, refuse_transforms
from fastsimclr.loss.reference import NORM_EPS, row_norms

LOG2_E = math.log2(math.e)


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
    with torch.autocast(z1.device.type, enabled=False), _matmul_precision(precision, z1.device):
        z = torch.cat([z1, z2]).to(dtype)
        norm = row_norms(z)
        z = z.mul_((_scale(temperature, dtype) / norm)[:, None])
        sizes, offset, all_z = [2 * n], 0, z
        if group:
            sizes = gather_sizes(2 * n, group_of(group), z.device)
            offset = sum(sizes[: dist.get_rank(group_of(group))])
            all_z = all_gather_rows(z, sizes, group_of(group))
        rows = sum(sizes)

        if _exp_is_safe(temperature, temperature_value, rows, dtype):
            log_w = _negative_sums(z, all_z, offset).log2_()
        else:
            log_w = _log_negative_sums(z, all_z, offset)
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
    with torch.autocast(z.device.type, enabled=False), _matmul_precision(precision, z.device):
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

        if _exp_is_safe(temperature, temperature_value, rows, z.dtype):
            dz = _negatives_gradient(z, all_z, offset, weights=g * torch.exp2(-lse))
        else:
            dz = _negatives_gradient(z, all_z, offset, weights=g, lse=lse)
        positive_weight = (g * q)[local]
        positive_weight = positive_weight + positive_weight.roll(n)
        # The gradient with respect to z^, up to the factors applied at the end.
        dz.addcmul_(z.roll(n, dims=0), positive_weight[:, None], value=-1)

        scale = _scale(temperature, z.dtype)
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


def _negative_sums(z: Tensor, all_z: Tensor, offset: int) -> Tensor:
    """Return W (2n,): the sum of 2^(z_i.z_j) over the negatives j of each local row i (row offset + i of all_z)."""
    w = z.new_zeros(z.shape[0])
    symmetric = all_z is z
    for row, a, column, b, tile in _tiles(z, all_z, symmetric):
        tile.exp2_()
        _fill_pairs(tile, row, column, z.shape[0], offset, 0.0)
        w[row : row + len(a)] += tile.sum(1)
        if symmetric and column > row:
            w[column : column + len(b)] += tile.sum(0)
    return w


def _log_negative_sums(z: Tensor, all_z: Tensor, offset: int) -> Tensor:
    """Return log2 of _negative_sums, with a running maximum per row, for temperatures at which 2^s overflows."""
    maximum = z.new_full((z.shape[0],), torch.finfo(z.dtype).min)
    w = torch.zeros_like(maximum)
    for row, a, column, _, tile in _tiles(z, all_z, symmetric=False):
        _fill_pairs(tile, row, column, z.shape[0], offset, -torch.inf)
        rows = slice(row, row + len(a))
        new = torch.maximum(maximum[rows], tile.amax(1))
        w[rows] = w[rows] * torch.exp2(maximum[rows] - new) + tile.sub_(new[:, None]).exp2_().sum(1)
        maximum[rows] = new
    return w.log2_() + maximum


def _negatives_gradient(z: Tensor, all_z: Tensor, offset: int, *, weights: Tensor, lse: Tensor | None = None) -> Tensor:
    """Return sum_j (g_i p_ij + g_j p_ji) z_j over the negatives j of each local row i: (2n, D).

    weights (M,): g_i / 2^lse_i, so that p_ij and p_ji share one exponential. With `lse` (for temperatures at which 2^s
    overflows): g_i, and the exponentials are of s_ij - lse_i and s_ij - lse_j.
    """
    dz = torch.zeros_like(z)
    symmetric = all_z is z
    buffer = z.new_empty(_tile_size(z.device) ** 2)
    for row, a, column, b, tile in _tiles(z, all_z, symmetric):
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


def _tiles(z: Tensor, all_z: Tensor, symmetric: bool) -> Iterator[tuple[int, Tensor, int, Tensor, Tensor]]:
    """Yield (row, a, column, b, a @ b.T) for each tile of z @ all_z.T; on and above the diagonal only if symmetric.

    a and b are the rows of z and of all_z that start at `row` and `column`. All products share one buffer.
    """
    size = _tile_size(z.device)
    buffer = z.new_empty(size * size)
    for row in range(0, z.shape[0], size):
        a = z[row : row + size]
        for column in range(row if symmetric else 0, all_z.shape[0], size):
            b = all_z[column : column + size]
            tile = buffer[: len(a) * len(b)].view(len(a), len(b))
            yield row, a, column, b, torch.mm(a, b.T, out=tile)


def _tile_size(device: torch.device) -> int:
    # CPU: 1 MiB of float32 per tile, which stays in a core's L2 cache for both passes. GPU: enough work per launch.
    return 512 if device.type == "cpu" else 4096


def _fill_pairs(tile: Tensor, row: int, column: int, local_rows: int, offset: int, value: float) -> None:
    """Fill the tile's entries of a row with itself and with its positive with `value`."""
    n = local_rows // 2
    for first, last, shift in ((0, 2 * n, 0), (0, n, n), (n, 2 * n, -n)):
        start = offset + shift - column  # the partner of local row i is the tile's column start + i
        low = max(first, row, -start)
        high = min(last, row + tile.shape[0], tile.shape[1] - start)
        if low < high:
            tile[low - row : high - row, start + low : start + high].diagonal().fill_(value)


def _scale(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norm of the scaled rows z, at which 2^(z_i.z_j) = exp(s_ij)."""
    return (LOG2_E / temperature.to(dtype)).sqrt()


def _exp_is_safe(temperature: Tensor, value: float | None, rows: int, dtype: torch.dtype) -> bool:
    """Return whether sums of `rows` exponentials exp(s), and their inverses, are finite normal numbers.

    |s| <= 1/temperature, as the rows are unit vectors. `value`: the temperature, if known. A temperature on a GPU is
    not read, to avoid a synchronization; the answer is then False, with which any value is computed correctly.
    """
    if value is None:
        if temperature.device.type != "cpu":
            return False
        value = float(temperature)
    largest = -math.log(torch.finfo(dtype).tiny)  # 87.3 in float32
    return 1.01 / value + math.log(rows) < largest  # 1.01: rounding of unit rows, also in bf16


class _MatmulPrecision:
    """Sets float32 matrix products to full precision ("highest"), or to bf16 (CPU) or TF32 (GPU) ("medium").

    PyTorch's setting is one for all threads of the process. So threads that need the same one share it, and others wait
    until the last of these has restored it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._current = self._before = ""

    @contextmanager
    def __call__(self, precision: str, device: torch.device) -> Iterator[None]:
        matmul: Any
        global_setting: Any
        if device.type == "cuda":  # PyTorch has the setting for all CUDA operators under cudnn
            matmul, global_setting, medium = torch.backends.cuda.matmul, torch.backends.cudnn, "tf32"
        else:
            mkldnn: Any = torch.backends.mkldnn  # Any: its type stubs have no `matmul`
            matmul, global_setting, medium = mkldnn.matmul, mkldnn, "bf16"
        wanted = "ieee" if precision == "highest" else medium
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0 or self._current == wanted)
            if self._users == 0:
                self._before = matmul.fp32_precision
                # The value may be matmul's own or inherited from all operators ("none"), which reading it does not
                # tell. If the two are equal, restore it as inherited.
                if self._before == global_setting.fp32_precision:
                    self._before = "none"
                self._current = matmul.fp32_precision = wanted
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if self._users == 0:
                    matmul.fp32_precision = self._before
                    self._changed.notify_all()


_cpu_precision, _gpu_precision = _MatmulPrecision(), _MatmulPrecision()


def _matmul_precision(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which float32 matrix products on `device` have this precision."""
    return (_gpu_precision if device.type == "cuda" else _cpu_precision)(precision, device)
