"""Hostile projections: the loss and its gradient are those of float64, or not finite, but never finite and wrong."""

import threading
from collections.abc import Callable

import pytest
import torch
from oracle import loss_and_gradients, row_losses, views
from torch import Tensor

from fastsimclr._extension import why_unavailable
from fastsimclr.loss import nt_xent

pytestmark = pytest.mark.usefixtures("one_thread")

EMULATED = pytest.param(
    "emulated", marks=pytest.mark.skipif(bool(why_unavailable(torch.device("cpu"))), reason="needs emulated kernels")
)
BACKENDS = ["reference", "tiled", EMULATED]
TEMPERATURES = [0.005, 0.02, 0.1, 1.0, 10.0]


def with_zeros(z: Tensor) -> Tensor:
    return z * (torch.arange(len(z)) % 3 > 0)[:, None]


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    """Return a function that makes a row of this value, with signs, and multiplies another one by it."""

    def change(z: Tensor) -> Tensor:
        z = z.clone()
        z[1] = value * z[1].sign()
        z[3] *= value
        return z

    return change


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": with_zeros,
    "all zeros": lambda z: 0 * z,
    "equal rows": lambda z: z[:1].expand_as(z).clone(),
    "opposite rows": lambda z: z[:1] * (1 - 2 * (torch.arange(len(z)) % 2))[:, None],
    "one column": lambda z: z * (torch.arange(z.shape[1]) == 0),
    **{f"{value:g}": with_value(value) for value in (1e38, 3e19, 1e18, 1e4, 1e-4, 1e-12, 1e-20, 1e-38, 1e-44)},
    "inf": with_value(torch.inf),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", CHANGES)
def test_as_float64_or_not_finite(change: str, dtype: torch.dtype, backend: str) -> None:
    z1, z2 = (CHANGES[change](z).to(dtype) for z in views(5, 7))
    for temperature in TEMPERATURES:
        exact = loss_and_gradients(row_losses("reference"), z1.double(), z2.double(), temperature)
        # "highest": emulated in 16 bits.
        losses, dz, _ = loss_and_gradients(row_losses(backend, precision="highest"), z1, z2, temperature)
        if not losses.isfinite().all():
            norms = torch.cat([z1, z2]).float().norm(dim=1)
            assert not norms.isfinite().all(), "the loss of finite norms is finite"
            continue
        bound = 2e-4 / min(temperature, 1)
        assert (losses - exact[0]).abs().max() <= bound * (1 + exact[0].abs().max())
        # dz scales with 1 / |z|, up to 1e12 for rows of zeros: relative to each row. Beyond its range, dtype has inf.
        largest = torch.finfo(dtype).max
        length = torch.cat([z1, z2]).double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        wanted = exact[1]
        is_large = wanted.abs() > 0.99 * largest
        assert not dz.isnan().any()
        assert (dz[is_large].abs() > 0.9 * largest).all()
        rest = ~is_large
        error = ((dz - wanted) * length)[rest & dz.isfinite()].abs()
        rounding = torch.finfo(dtype).eps * (wanted * length)[rest].abs()
        subnormal = torch.finfo(dtype).smallest_normal * length.max()
        assert dz[rest].isfinite().all()
        assert error.numel() == 0 or error.max() <= bound + rounding.max() + subnormal


def test_eight_threads_get_the_results_of_one() -> None:
    """Each precision is a setting of the process, which no thread may change while another one computes."""
    z1, z2 = views(40, 16, torch.float32)
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    exact = loss_and_gradients(row_losses("reference"), z1.double(), z2.double(), 0.1)
    backends = ["tiled", "reference"] + (["emulated"] if not why_unavailable(torch.device("cpu")) else [])
    failures: list[str] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        precision, backend = ("highest", "medium")[number % 2], backends[number // 2 % len(backends)]
        bound = 1e-3 if precision == "highest" else 0.1
        start.wait()
        for _ in range(30 if backend != "emulated" else 3):
            got = loss_and_gradients(row_losses(backend, precision=precision), z1, z2, 0.1)
            for a, b in zip(got, exact, strict=True):
                if not (a - b).abs().max() <= bound * b.abs().max():
                    failures.append(f"{backend} {precision}: {(a - b).abs().max()}")
            if backend == "tiled" and number % 4 == 0:
                seen.append(nt_xent(z1, z2, backend="tiled", precision="highest").item())

    seen: list[float] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(set(seen)) == 1
    assert setting.fp32_precision == before
