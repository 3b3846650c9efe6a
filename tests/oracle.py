"""Helpers for tests of the NT-Xent loss: projections, eager PyTorch losses to compare with, and error bounds."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimclr._extension import why_unavailable
from fastsimclr.loss import nt_xent

needs_emulation = pytest.mark.skipif(
    bool(why_unavailable(torch.device("cpu"))), reason=why_unavailable(torch.device("cpu")) or "-"
)
RowLosses = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z1, z2, temperature) -> losses (2N,)


def views(n: int, d: int, dtype: torch.dtype = torch.float64, *, noise: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Return projections (n, d) of two views of n images, with row norms from 0.1 to 10.

    noise: distance between the two views; the loss decreases with it.
    """
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=random, dtype=torch.float64)
    both = [z + noise * torch.randn(n, d, generator=random, dtype=torch.float64) for _ in range(2)]
    return [(z * 10 ** (2 * torch.rand(n, 1, generator=random, dtype=torch.float64) - 1)).to(dtype) for z in both]


def loss_and_gradients(
    loss: RowLosses, z1: Tensor, z2: Tensor, temperature: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return in float64 the losses (2N,), and dz (2N, D) and dtemperature of their mean, or of their weighted sum."""
    z1, z2 = (z.detach().clone().requires_grad_() for z in (z1, z2))
    t = torch.tensor(temperature, dtype=torch.promote_types(z1.dtype, torch.float32), requires_grad=True)
    losses = loss(z1, z2, t)
    total = losses.mean() if weights is None else losses @ weights.to(losses.dtype)
    dz1, dz2, dt = torch.autograd.grad(total, (z1, z2, t))
    return losses.detach().double(), torch.cat([dz1, dz2]).double(), dt.double()


def row_losses(backend: str, **options: Any) -> RowLosses:
    """`nt_xent` with this backend and one loss per row."""
    return lambda z1, z2, t: nt_xent(z1, z2, t, backend=backend, reduction="none", **options)


def textbook(z1: Tensor, z2: Tensor, temperature: Tensor) -> Tensor:
    """The usual dense loss in eager PyTorch, in the inputs' dtype: the accuracy yardstick. Returns losses (2N,)."""
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = z @ z.T / temperature.to(z.dtype)
    s = s.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=s.device), -math.inf)
    return F.cross_entropy(s, torch.arange(2 * n, device=s.device).roll(n), reduction="none")


def split_product(x: Tensor, y: Tensor, planes: int) -> Tensor:
    """x @ y.T of float32 matrices, each number rounded to a sum of `planes` bf16 numbers, as on tensor cores."""
    (x_high, x_low), (y_high, y_low) = (_split(z) for z in (x, y))
    product = x_high @ y_high.T
    return product if planes == 1 else product + x_high @ y_low.T + x_low @ y_high.T


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16().float()
    return high, (x - high).bfloat16().float()


class _Similarities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, planes: int) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.planes = planes
        return split_product(a, b, planes)

    @staticmethod
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        if a is b:  # in one product: the sum of two would have two rounding errors
            return split_product(ds + ds.T, a.T.contiguous(), ctx.planes), torch.zeros_like(b), None
        da, db = split_product(ds, b.T.contiguous(), ctx.planes), split_product(ds.T, a.T.contiguous(), ctx.planes)
        return da, db, None


def textbook_in_bf16(planes: int) -> RowLosses:
    """`textbook` with matrix products in bf16, each factor as `planes` (1 or 2) bf16 numbers, the rest in float32."""

    def losses(z1: Tensor, z2: Tensor, temperature: Tensor) -> Tensor:
        n = len(z1)
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
        s = _Similarities.apply(z, z, planes) / temperature
        s = s.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=s.device), -math.inf)
        return F.cross_entropy(s, torch.arange(2 * n, device=s.device).roll(n), reduction="none")

    return losses


def textbook_towers(planes: int | None) -> RowLosses:
    """CLIP's dense loss in eager PyTorch, in the inputs' dtype, or as `textbook_in_bf16`: losses (2N,)."""

    def losses(a: Tensor, b: Tensor, temperature: Tensor) -> Tensor:
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        s = (a @ b.T if planes is None else _Similarities.apply(a, b, planes)) / temperature.to(a.dtype)
        labels = torch.arange(len(a), device=s.device)
        return torch.cat([F.cross_entropy(each, labels, reduction="none") for each in (s, s.T)])

    return losses


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Assert that all elements differ by at most `tolerance`, relative or absolute."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_as_accurate(
    got: RowLosses,
    eager: RowLosses,
    batches: list[list[Tensor]],
    temperature: float,
    *,
    exact_loss: RowLosses | None = None,
    g_rounding: float = 0.0,
) -> None:
    """Assert error <= 2 times the error of eager PyTorch in the same precision + 2 roundings, against a float64 oracle.

    exact_loss: the oracle; None: `nt_xent`'s reference.

    Checks the loss and dz of each row, and dtemperature. dz is multiplied by |z|, since it scales with 1/|z|. Eager
    PyTorch may be exact for single rows by chance, so the worst rows over all batches are compared. g_rounding:
    relative rounding error of the p_ij that multiply Z in the backward; eager PyTorch computes dtemperature without
    that product.
    """
    exact_loss = exact_loss or row_losses("reference")
    # Per quantity: our worst error, eager's worst error, the largest exact value.
    worst = {name: [0.0, 0.0, 0.0] for name in ("losses", "dz", "dtemperature")}
    negatives_share = 0.0
    for z1, z2 in batches:
        mine, theirs = (loss_and_gradients(loss, z1, z2, temperature) for loss in (got, eager))
        oracle = loss_and_gradients(exact_loss, z1.double(), z2.double(), temperature)
        length = torch.cat([z1, z2]).double().norm(dim=1, keepdim=True)
        negatives_share = max(negatives_share, -torch.expm1(-oracle[0]).mean().item())
        for found, a, b, exact, scale in zip(worst.values(), mine, theirs, oracle, (1, length, 1), strict=True):
            for i, x in enumerate((a - exact, b - exact, exact)):
                rows = (x * scale).reshape(len(x) if x.ndim else 1, -1).norm(dim=1)
                found[i] = max(found[i], math.inf if rows.isnan().any() else rows.max().item())

    # dtemperature is one number. An error e of a similarity becomes e / temperature in a loss and e / temperature^2 in
    # dtemperature. The sizes of its terms add up to the negatives' shares of the denominators, whatever their sum.
    found = worst["dtemperature"]
    found[1] = max(found[1], worst["losses"][1] / temperature, g_rounding * negatives_share / temperature**2)
    eps, tiny = torch.finfo(batches[0][0].dtype).eps, torch.finfo(torch.float32).tiny  # below tiny: few or no bits
    for name, (error, yardstick, size) in worst.items():
        bound = 2 * yardstick + 2 * eps * size + tiny
        assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g} = 2 * eager's {yardstick:.3g} + 2 roundings"


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()
