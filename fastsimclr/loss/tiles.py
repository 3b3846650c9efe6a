"""Sums of exponentials over a matrix of similarities, and their gradients, tile by tile, on any device.

Rows are unit vectors, scaled by sqrt(log2(e) / temperature): then 2^(x_i.y_j) = exp(s_ij), with the cosine similarity
divided by temperature s_ij. On a CPU exp2 is four times faster than exp. Only one tile of the matrix is in memory at a
time. If the columns are the rows, the matrix is symmetric, and only tiles on and above its diagonal are computed.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastsimclr.distributed import all_gather_rows
from fastsimclr.precision import choose_precision

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Pairs:
    """The similarities that are not among the negatives: of row i with column offset + i, and with its partner's.

    A row's partner is row i + distance for i < distance, otherwise row i - distance. distance 0: there are no partners.
    """

    offset: int = 0
    distance: int = 0


@dataclass(frozen=True)
class RowLosses:
    """Of the rows, or the columns, of the matrix: log2 of their sums, and the gradient with respect to it."""

    log_sums: Tensor
    gradient: Tensor

    @classmethod
    def none(cls, x: Tensor) -> "RowLosses":
        """Without a gradient, for rows x (N, ...). With infinite sums, also exponentials that overflow count as 0."""
        floats = torch.promote_types(x.dtype, torch.float32)
        return cls(x.new_full((len(x),), torch.inf, dtype=floats), x.new_zeros(len(x), dtype=floats))


def scale_of(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norm of the scaled rows."""
    return (LOG2_E / temperature.to(dtype)).sqrt()


def log_sums(
    x: Tensor, y: Tensor, pairs: Pairs | None, *, exp_is_safe: bool, columns: bool = False
) -> tuple[Tensor, Tensor]:
    """Return log2 of the sums of 2^(x_i.y_j) over the columns that are negatives of each row, (N,).

    x: (N, D). y: (M, D). pairs: None if all columns are negatives. columns: also return the same for each column, (M,),
    otherwise an empty tensor; not if y is x.
    """
    if exp_is_safe:
        w, w_columns = _sums(x, y, pairs, columns)
        return w.log2_(), w_columns.log2_()
    return _sums_with_maximum(x, y, pairs, columns)


def _sums(x: Tensor, y: Tensor, pairs: Pairs | None, columns: bool) -> tuple[Tensor, Tensor]:
    w, w_columns = x.new_zeros(len(x)), x.new_zeros(len(y) if columns else 0)
    symmetric = y is x
    for row, a, column, b, tile in _tiles(x, y, symmetric):
        tile.exp2_()
        _fill_pairs(tile, row, column, len(x), pairs, 0.0)
        w[row : row + len(a)] += tile.sum(1)
        if symmetric and column > row:
            w[column : column + len(b)] += tile.sum(0)
        if columns:
            w_columns[column : column + len(b)] += tile.sum(0)
    return w, w_columns


def _sums_with_maximum(x: Tensor, y: Tensor, pairs: Pairs | None, columns: bool) -> tuple[Tensor, Tensor]:
    """log2 of `_sums`, with a running maximum of each row and column, for temperatures at which 2^(x.y) overflows."""
    w, w_columns = x.new_zeros(len(x)), x.new_zeros(len(y) if columns else 0)
    maximum, maximum_columns = (torch.full_like(sums, torch.finfo(x.dtype).min) for sums in (w, w_columns))
    for row, a, column, b, tile in _tiles(x, y, symmetric=False):
        _fill_pairs(tile, row, column, len(x), pairs, -torch.inf)
        if columns:
            part = slice(column, column + len(b))
            new = torch.maximum(maximum_columns[part], tile.amax(0))
            w_columns[part] = w_columns[part] * torch.exp2(maximum_columns[part] - new) + (tile - new).exp2_().sum(0)
            maximum_columns[part] = new
        part = slice(row, row + len(a))
        new = torch.maximum(maximum[part], tile.amax(1))
        w[part] = w[part] * torch.exp2(maximum[part] - new) + tile.sub_(new[:, None]).exp2_().sum(1)
        maximum[part] = new
    return w.log2_() + maximum, w_columns.log2_() + maximum_columns


def gradients(
    x: Tensor,
    y: Tensor,
    pairs: Pairs | None,
    rows: RowLosses | None,
    columns: RowLosses | None,
    *,
    exp_is_safe: bool,
    of_columns: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return sum_j G_ij y_j over the negatives j of each row i, (N, D), with G_ij = g_i p_ij + h_j q_ij.

    p_ij = 2^(x_i.y_j) / the sum of row i, q_ij = 2^(x_i.y_j) / the sum of column j; g and h are the gradients of rows
    and columns, 0 for None. of_columns: also return sum_i G_ij x_i of each column, (M, D), otherwise an empty tensor.
    If y is x, the rows are the columns, and the first result is complete.
    """
    rows, columns = rows or RowLosses.none(x), columns or RowLosses.none(y)
    dx, dy = torch.zeros_like(x), torch.zeros_like(y) if of_columns else y.new_empty(0)
    symmetric = y is x
    if exp_is_safe:  # p and q share one exponential
        row_weights, column_weights = (each.gradient * torch.exp2(-each.log_sums) for each in (rows, columns))
    else:
        row_weights, column_weights = rows.gradient, columns.gradient
    buffer = x.new_empty(tile_size(x.device) ** 2)
    for row, a, column, b, tile in _tiles(x, y, symmetric):
        of_a, of_b = slice(row, row + len(a)), slice(column, column + len(b))
        other = buffer[: tile.numel()].view_as(tile)
        if exp_is_safe:
            torch.add(row_weights[of_a, None], column_weights[of_b], out=other)
            tile.exp2_().mul_(other)
        else:
            torch.sub(tile, columns.log_sums[of_b], out=other).exp2_().mul_(column_weights[of_b])
            tile.sub_(rows.log_sums[of_a, None]).exp2_().mul_(row_weights[of_a, None]).add_(other)
        _fill_pairs(tile, row, column, len(x), pairs, 0.0)
        dx[of_a].addmm_(tile, b)
        if symmetric and column > row:
            dx[of_b].addmm_(tile.T, a)
        if of_columns:
            dy[of_b].addmm_(tile.T, a)
    return dx, dy


class TiledSums:
    """The sums and gradients of unit rows, which are prepared once: scaled, (N, D)."""

    def __init__(
        self, like: Tensor, temperature: Tensor, temperature_value: float | None, precision: str, terms: int
    ) -> None:
        """like: (N, D) unit rows. terms: largest number of exponentials in a sum."""
        self._scale = scale_of(temperature, like.dtype)
        self._exp_is_safe = exp_is_safe(temperature, temperature_value, terms, like.dtype)
        self._precision, self._device = precision, like.device

    @staticmethod
    def empty_like_prepared(a: Tensor, precision: str) -> Tensor:
        return a.new_empty(0, a.shape[1])

    @contextmanager
    def context(self) -> Iterator[None]:
        """Set the precision of the products, which everything below needs."""
        with torch.autocast(self._device.type, enabled=False), matmul_precision(self._precision, self._device):
            yield

    def prepare(self, a: Tensor) -> Tensor:
        return a * self._scale

    def log_sums(self, x: Tensor, y: Tensor, pairs: Pairs | None, *, columns: bool = False) -> tuple[Tensor, Tensor]:
        return log_sums(x, y, pairs, exp_is_safe=self._exp_is_safe, columns=columns)

    def gradients(
        self,
        x: Tensor,
        y: Tensor,
        pairs: Pairs | None,
        rows: RowLosses | None,
        columns: RowLosses | None,
        *,
        of_columns: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return `gradients` with unit instead of scaled rows as factors."""
        safe = self._exp_is_safe
        dx, dy = gradients(x, y, pairs, rows, columns, exp_is_safe=safe, of_columns=of_columns)
        return dx.div_(self._scale), dy.div_(self._scale)


def _tiles(x: Tensor, y: Tensor, symmetric: bool) -> Iterator[tuple[int, Tensor, int, Tensor, Tensor]]:
    """Yield (row, a, column, b, a @ b.T) for each tile of x @ y.T; on and above the diagonal only if symmetric.

    a and b are the rows of x and of y that start at `row` and `column`. All products share one buffer.
    """
    size = tile_size(x.device)
    buffer = x.new_empty(size * size)
    for row in range(0, len(x), size):
        a = x[row : row + size]
        for column in range(row if symmetric else 0, len(y), size):
            b = y[column : column + size]
            tile = buffer[: len(a) * len(b)].view(len(a), len(b))
            yield row, a, column, b, torch.mm(a, b.T, out=tile)


def tile_size(device: torch.device) -> int:
    """Return the number of rows and columns of a tile."""
    # CPU: 1 MiB of float32 per tile, which stays in a core's L2 cache for both passes. GPU: enough work per launch.
    return 512 if device.type == "cpu" else 4096


def _fill_pairs(tile: Tensor, row: int, column: int, rows: int, pairs: Pairs | None, value: float) -> None:
    """Fill the entries of a tile that are not among the negatives with `value`. rows: number of rows of the matrix."""
    if pairs is None:
        return
    diagonals = [(0, rows, 0)]  # first row, last row, column - row
    if n := pairs.distance:
        diagonals += [(0, n, n), (n, rows, -n)]
    for first, last, shift in diagonals:
        start = pairs.offset + shift - column  # row i is excluded with the tile's column start + i
        low = max(first, row, -start)
        high = min(last, row + tile.shape[0], tile.shape[1] - start)
        if low < high:
            tile[low - row : high - row, start + low : start + high].diagonal().fill_(value)


def exp_is_safe(temperature: Tensor, value: float | None, terms: int, dtype: torch.dtype) -> bool:
    """Return whether sums of up to `terms` exponentials exp(s), and their inverses, are finite normal numbers.

    |s| <= 1/temperature, as the rows are unit vectors. `value`: the temperature, if known. A temperature on a GPU is
    not read, to avoid a synchronization; the answer is then False, with which any value is computed correctly.
    """
    if value is None:
        if temperature.device.type != "cpu":
            return False
        value = float(temperature)
    largest = -math.log(torch.finfo(dtype).tiny)  # 87.3 in float32
    return 1.01 / value + math.log(terms) < largest  # 1.01: rounding of unit rows, also in bf16


def gather_factors(rows: Tensor, sizes: list[int], group: dist.ProcessGroup, precision: str) -> Tensor:
    """Gather rows of all ranks to multiply them: in bf16, which halves the bytes, if a CPU rounds them to it anyway."""
    is_rounded = precision == "medium" and rows.dtype == torch.float32 and rows.device.type == "cpu"
    if is_rounded and choose_precision("auto", rows.device).autocast == torch.bfloat16:
        return all_gather_rows(rows.bfloat16(), sizes, group).float()
    return all_gather_rows(rows, sizes, group)


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


def matmul_precision(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which float32 matrix products on `device` have this precision."""
    return (_gpu_precision if device.type == "cuda" else _cpu_precision)(precision, device)
