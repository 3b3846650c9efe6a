"""The sums over negatives, and their gradients, with the compiled kernels of NT-Xent (csrc/forward.cu, backward.cu)."""

from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from fastsimclr.loss.fused import Kernels, check_rows, padded_width, planes_of
from fastsimclr.loss.tiles import Pairs, RowLosses


class FusedSums:
    """As `tiles.TiledSums`. Rows are prepared as (N, planes, width) bf16."""

    def __init__(
        self, like: Tensor, temperature: Tensor, temperature_value: float | None, precision: str, terms: int
    ) -> None:
        check_rows(terms)
        self._kernels = Kernels(like, temperature, temperature_value)
        self._precision, self._features, self._terms = precision, like.shape[1], terms
        self._shape = {"planes": planes_of(precision), "width": padded_width(like.shape[1])}
        smallest = self._kernels.query("smallest_temperature", columns=terms)
        known = self._kernels.value
        # Decided in float32, as by the kernels.
        self._exp_is_safe = temperature.float() >= smallest if known is None else float(np.float32(known)) >= smallest

    @staticmethod
    def empty_like_prepared(a: Tensor, precision: str) -> Tensor:
        return a.new_empty(0, planes_of(precision), padded_width(a.shape[1]), dtype=torch.bfloat16)

    def context(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", enabled=False)

    def prepare(self, a: Tensor) -> Tensor:
        prepared = a.new_zeros(len(a), *self._shape.values(), dtype=torch.bfloat16)
        for plane, part in enumerate(_planes(a, self._precision)):
            prepared[:, plane, : a.shape[1]] = part
        return prepared

    def log_sums(self, x: Tensor, y: Tensor, pairs: Pairs | None, *, columns: bool = False) -> tuple[Tensor, Tensor]:
        assert not columns or pairs is None or pairs == Pairs()
        rows = self._log_sums(x, y, pairs)
        return rows, self._log_sums(y, x, pairs) if columns else rows.new_empty(0)

    def _log_sums(self, x: Tensor, y: Tensor, pairs: Pairs | None) -> Tensor:
        symmetric = y is x
        unit = self._kernels.query(
            "forward_column_unit", rows=len(x), columns=len(y), symmetric=symmetric, **self._shape
        )
        sums = self._kernels.floats(-(-len(y) // unit), len(x))
        self._kernels(
            "forward", rows=x.data_ptr(), row_count=len(x), columns=y.data_ptr(), column_count=len(y), **self._shape,
            symmetric=symmetric, pairs=pairs and (pairs.offset, pairs.distance), all_columns=self._terms,
            **self._kernels.temperature, column_unit=unit, sums=sums.data_ptr(),
        )  # fmt: skip
        if self._exp_is_safe is True:
            return sums.sum(0).log2_()
        largest = sums.amax(0)  # of logarithms, which the kernel writes if exponentials may overflow
        of_logarithms = (sums - largest).exp2_().sum(0).log2_() + largest
        if self._exp_is_safe is False:
            return of_logarithms
        return torch.where(self._exp_is_safe, sums.sum(0).log2_(), of_logarithms)

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
        assert not of_columns or pairs is None or pairs == Pairs()
        dx = self._gradients(x, y, pairs, rows, columns)
        return dx, self._gradients(y, x, pairs, columns, rows) if of_columns else dx.new_empty(0)

    def _gradients(
        self, x: Tensor, y: Tensor, pairs: Pairs | None, rows: RowLosses | None, columns: RowLosses | None
    ) -> Tensor:
        splits = self._kernels.query("backward_splits", rows=len(x), columns=len(y), **self._shape)
        sums = self._kernels.floats(splits, len(x), self._shape["width"])
        of_rows, of_columns = _arguments(rows or RowLosses.none(x)), _arguments(columns or RowLosses.none(y))
        self._kernels(
            "backward", rows=x.data_ptr(), row_count=len(x), columns=y.data_ptr(), column_count=len(y), **self._shape,
            pairs=pairs and (pairs.offset, pairs.distance), all_columns=self._terms, **self._kernels.temperature,
            row_losses=tuple(each.data_ptr() for each in of_rows),
            column_losses=tuple(each.data_ptr() for each in of_columns), splits=splits, sums=sums.data_ptr(),
        )  # fmt: skip
        return sums.sum(0)[:, : self._features]


def _arguments(losses: RowLosses) -> tuple[Tensor, Tensor]:
    """Return the logarithms and gradients as the kernels read them."""
    return losses.log_sums.contiguous(), losses.gradient.contiguous()


def as_multiplied(a: Tensor, precision: str) -> Tensor:
    """Return a (N, D) rounded to the numbers that the kernels multiply. The gradient is that of a."""
    with torch.no_grad():
        rounded = torch.stack([part.float() for part in _planes(a, precision)]).sum(0)
        error = rounded - a
    return a + error


def _planes(a: Tensor, precision: str) -> list[Tensor]:
    high = a.bfloat16()
    return [high] if planes_of(precision) == 1 else [high, (a - high.float()).bfloat16()]
