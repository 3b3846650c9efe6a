"""Logarithms of the sums over negatives that contrastive losses have in common, as differentiable PyTorch operators.

For unit rows a (N, D) and b (M, D), and the similarities s_ij = a_i.b_j / temperature, they are

    x_i = log sum over the negatives j of i of exp(s_ij)        and, for each column,        y_j = log sum_i exp(s_ij)

With g and h the incoming gradients of x and y, p_ij = exp(s_ij - x_i) and q_ij = exp(s_ij - y_j):

    da_i = 1/temperature * sum_j (g_i p_ij + h_j q_ij) b_j      db_j = 1/temperature * sum_i (g_i p_ij + h_j q_ij) a_i

The matrix s is never in memory: the tiles (tiles.py) or the kernels (fused_sums.py) of NT-Xent compute it again in the
backward pass. The rest of a loss, of N numbers each, is plain PyTorch: log(1 + exp(x_i - s_i,pos)) has the gradient
sigmoid(x_i - s_i,pos) p_ij, which does not cancel near convergence.

With a group, the columns are the rows of all ranks, which gather rows in the forward pass, and g and h in the backward
pass. Each rank then computes the gradients of its own rows exactly.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.distributed import all_gather_rows, gather_rows, gather_sizes, group_name, group_of
from fastsimclr.loss.autograd_modes import define_modes, refuse_transforms
from fastsimclr.loss.fused_sums import FusedSums, as_multiplied
from fastsimclr.loss.options import Computation
from fastsimclr.loss.reference import row_norms
from fastsimclr.loss.tiles import LOG2_E, Pairs, RowLosses, TiledSums, gather_factors


@dataclass(frozen=True)
class LogSums:
    """Sums over the negatives of this rank's rows and columns, as natural logarithms."""

    rows: Tensor
    """(N,)"""
    columns: Tensor
    """(N,), for each row of b over the rows of a; (0,) unless requested."""
    rows_on_all_ranks: list[int]
    """N of each rank."""


def unit_rows(z: Tensor, how: Computation) -> Tensor:
    """Return z / |z| in at least float32, rounded as the fused kernels multiply it.

    The similarity of a negative that is nearly as close as the positive then has the same rounding error as the
    positive's, and both cancel in the loss.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z = z / row_norms(z)[:, None]
    return as_multiplied(z, how.precision) if how.implementation in ("fused", "emulated") else z


def softmax_losses(log_negatives: Tensor, positive: Tensor, decoupled: bool) -> Tensor:
    """Return -log of the softmax of the positives, (N,), from their similarities divided by temperature, (N,).

    decoupled: leave the positives out of the denominators.
    """
    x = log_negatives - positive
    return x if decoupled else -F.logsigmoid(-x)


def reduce(losses: Tensor, rows_on_all_ranks: list[int], how: Computation, *, per_row: int = 1) -> Tensor:
    """Return the losses, or their mean as `nt_xent` defines it for a group. per_row: losses of each row."""
    ranks = len(rows_on_all_ranks)
    return losses.sum() * (ranks / (per_row * sum(rows_on_all_ranks))) if how.mean else losses


def log_negatives(
    a: Tensor,
    b: Tensor | None,
    how: Computation,
    *,
    hardness: float = 0.0,
    partners: bool = False,
    columns: bool = False,
    extra: Tensor | None = None,
    among_columns: bool = True,
) -> LogSums:
    """Return the logarithms of the sums over the negatives of each row: over all columns except its own.

    a, b: (N, D) unit rows. b None: the columns are the rows of a.
    partners: also leave out the column of the row's other view, N/2 rows away.
    columns: also return the sums of each column over the rows.
    extra: (K, D) unit rows, further negatives of the rows of a. among_columns: if False, they are the only ones.
    hardness: as for `nt_xent`; the exponentials are then weighted.
    """
    if hardness:
        options: dict[str, Any] = {"partners": partners, "columns": columns}
        options |= {"extra": extra, "among_columns": among_columns}
        weighted = log_negatives(a, b, how.with_temperature_divided_by(1 + hardness), **options)
        weights = log_negatives(a, b, how.with_temperature_divided_by(hardness), **options)
        total = sum(weights.rows_on_all_ranks) - (2 if partners else 1) if among_columns else 0
        of_rows = math.log(total + (0 if extra is None else len(extra)))
        return LogSums(
            weighted.rows - weights.rows + of_rows,
            weighted.columns - weights.columns + (math.log(total) if columns else 0.0),
            weights.rows_on_all_ranks,
        )
    sizes = [len(a)] if how.group is None else gather_sizes(len(a), how.group, a.device)
    of_extra = None if extra is None else _log_sums(a, extra, how, None, [len(a)], None)[0]
    if not among_columns:
        assert of_extra is not None
        return LogSums(of_extra, a.new_empty(0), sizes)
    pairs = Pairs(0 if how.group is None else sum(sizes[: dist.get_rank(how.group)]), len(a) // 2 if partners else 0)
    rows, of_columns = _log_sums(a, b, how, pairs, sizes, how.group, columns=columns)
    return LogSums(rows if of_extra is None else torch.logaddexp(rows, of_extra), of_columns, sizes)


def _log_sums(
    a: Tensor,
    b: Tensor | None,
    how: Computation,
    pairs: Pairs | None,
    sizes: list[int],
    group: dist.ProcessGroup | None,
    *,
    columns: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum over the columns: the rows of b, or of a, on all ranks of the group. sizes: number of rows on each rank."""
    if how.implementation == "reference":
        return _dense(a, b, how, pairs, sizes, group, columns=columns)
    refuse_transforms(how.implementation)
    temperature = how.temperature_like(a)
    rows, of_columns = log_sums_forward(
        a, b, temperature, group_name(group), sizes, *((pairs.offset, pairs.distance) if pairs else (-1, 0)), columns,
        b is not None and b.requires_grad, how.implementation, how.precision, how.temperature_value,
    )[:2]  # fmt: skip
    return rows / LOG2_E, of_columns / LOG2_E


def _dense(
    a: Tensor,
    b: Tensor | None,
    how: Computation,
    pairs: Pairs | None,
    sizes: list[int],
    group: dist.ProcessGroup | None,
    *,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    """The sums from the whole matrix, by PyTorch's autograd. The tests compare with them."""

    def of(rows: Tensor, columns: Tensor) -> Tensor:
        columns = columns if group is None else gather_rows(columns, sizes, group)
        s = rows @ columns.T / how.temperature_like(a).to(a.dtype)
        if pairs is not None:
            row = torch.arange(len(rows), device=s.device)
            excluded = torch.zeros_like(s, dtype=torch.bool)
            excluded[row, row + pairs.offset] = True
            if n := pairs.distance:
                excluded[row, (row + n) % (2 * n) + pairs.offset] = True
            s = s.masked_fill(excluded, -torch.inf)
        return s.logsumexp(dim=1)

    return of(a, a if b is None else b), of(b, a) if columns and b is not None else a.new_empty(0)


def _sums(
    implementation: str, like: Tensor, temperature: Tensor, value: float | None, precision: str, terms: int
) -> TiledSums | FusedSums:
    kind = TiledSums if implementation == "tiled" else FusedSums
    return kind(like, temperature, value, precision, terms)


def _pairs(offset: int, distance: int) -> Pairs | None:
    return None if offset < 0 else Pairs(offset, distance)


@torch.library.custom_op("fastsimclr::log_sums_forward", mutates_args=())
def log_sums_forward(
    a: Tensor,
    b: Tensor | None,
    temperature: Tensor,
    group: str,
    sizes: list[int],
    offset: int,
    distance: int,
    columns: bool,
    b_needs_gradient: bool,
    implementation: str,
    precision: str,
    temperature_value: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log2 of the sums of the rows and columns, and a and b of all ranks as prepared (empty without a group)."""
    terms = max(sum(sizes), 0 if b is None else len(b))
    sums = _sums(implementation, a, temperature, temperature_value, precision, terms)
    pairs = _pairs(offset, distance)
    with sums.context():
        x = sums.prepare(a)
        y = None if b is None else sums.prepare(b)
        empty = x.new_empty(0, *x.shape[1:])
        if not group:
            return *sums.log_sums(x, x if y is None else y, pairs, columns=columns), empty, empty.clone()
        needs_all_a = y is None or columns or b_needs_gradient
        all_x = gather_factors(x, sizes, group_of(group), precision) if needs_all_a else empty
        all_y = empty.clone() if y is None else gather_factors(y, sizes, group_of(group), precision)
        rows, of_columns = sums.log_sums(x, all_x if y is None else all_y, pairs)
        if columns:
            assert y is not None
            of_columns, _ = sums.log_sums(y, all_x, pairs)
        return rows, of_columns, all_x, all_y


@log_sums_forward.register_fake
def _(a, b, temperature, group, sizes, offset, distance, columns, b_needs_gradient, implementation, precision, value):  # type: ignore[no-untyped-def]
    kind = TiledSums if implementation == "tiled" else FusedSums
    prepared = kind.empty_like_prepared(a, precision)
    rows = a.new_empty(len(a), dtype=prepared.dtype if implementation == "tiled" else torch.float32)
    total = sum(sizes) if group else 0
    of_a = total if b is None or columns or b_needs_gradient else 0
    return (
        rows,
        rows.new_empty(0 if b is None or not columns else len(b)),
        prepared.new_empty(of_a, *prepared.shape[1:]),
        prepared.new_empty(0 if b is None else total, *prepared.shape[1:]),
    )


@torch.library.custom_op("fastsimclr::log_sums_backward", mutates_args=())
def log_sums_backward(
    g: Tensor,
    h: Tensor,
    a: Tensor,
    b: Tensor | None,
    log_rows: Tensor,
    log_columns: Tensor,
    all_x: Tensor,
    all_y: Tensor,
    temperature: Tensor,
    group: str,
    sizes: list[int],
    offset: int,
    distance: int,
    of_b: bool,
    implementation: str,
    precision: str,
    temperature_value: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a, b ((0,) unless of_b) and the temperature, for g and h of log_rows and log_columns.

    log_columns and h may be empty: of no columns. Other arguments as in log_sums_forward.
    """
    columns = len(log_columns) > 0
    terms = max(sum(sizes), 0 if b is None else len(b))
    sums = _sums(implementation, a, temperature, temperature_value, precision, terms)
    pairs = _pairs(offset, distance)
    with sums.context():
        x = sums.prepare(a)
        y = x if b is None else sums.prepare(b)
        # Scaled to a maximum of 1, and back at the end: with a mean's factor 1/N, g / 2^log_rows would be subnormal.
        both = torch.cat([g, h]).abs().amax()
        if group:
            dist.all_reduce(both, dist.ReduceOp.MAX, group=group_of(group))
        g_scale = both.clamp_min_(torch.finfo(g.dtype).tiny)
        rows = RowLosses(log_rows, g / g_scale)
        of_columns = RowLosses(log_columns, h / g_scale) if columns else None
        if not group:
            da, db = sums.gradients(x, y, pairs, rows, rows if b is None else of_columns, of_columns=of_b)
        else:
            everyone = _gathered(rows, sizes, group)
            columns_of_everyone = _gathered(of_columns, sizes, group) if of_columns else None
            if b is None:
                da, db = sums.gradients(x, all_x, pairs, rows, everyone)
            else:
                da, db = sums.gradients(x, all_y, pairs, rows, columns_of_everyone)
            if of_b:
                db, _ = sums.gradients(y, all_x, pairs, of_columns, everyone)
        factor = g_scale * LOG2_E / temperature.to(da.dtype)
        da, db = da * factor, db * factor
        # In a symmetric matrix, each similarity has a row in `a` as a row and as a column.
        dtemperature = (a * da).sum() * ((-0.5 if b is None else -1.0) / temperature.to(da.dtype))
        return da, db, dtemperature


def _gathered(losses: RowLosses, sizes: list[int], group: str) -> RowLosses:
    both = all_gather_rows(torch.stack([losses.log_sums, losses.gradient], dim=1), sizes, group_of(group))
    return RowLosses(both[:, 0].contiguous(), both[:, 1].contiguous())


@log_sums_backward.register_fake
def _(g, h, a, b, log_rows, log_columns, all_x, all_y, temperature, group, sizes, offset, distance, of_b, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(a), torch.empty_like(b) if of_b else a.new_empty(0), a.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, temperature, ctx.group, ctx.sizes, ctx.offset, ctx.distance, _, _, *ctx.how = inputs
    ctx.save_for_backward(a, b, temperature, *output)
    ctx.set_materialize_grads(False)  # see tiled.py


def _backward(ctx: Any, g: Tensor | None, h: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if g is None and h is None:  # gradcheck calls it without any gradient
        return (None,) * 12
    refuse_transforms(ctx.how[0])
    a, b, temperature, log_rows, log_columns, all_x, all_y = ctx.saved_tensors
    of_b = b is not None and ctx.needs_input_grad[1]
    da, db, dtemperature = log_sums_backward(
        torch.zeros_like(log_rows) if g is None else g, torch.zeros_like(log_columns) if h is None else h,
        a, b, log_rows, log_columns, all_x, all_y, temperature, ctx.group, ctx.sizes, ctx.offset, ctx.distance, of_b,
        *ctx.how,
    )  # fmt: skip
    return da, db if of_b else None, dtemperature.to(temperature), *(None,) * 9


log_sums_forward.register_autograd(_backward, setup_context=_setup_context)
define_modes("tiled", log_sums_forward, log_sums_backward)
