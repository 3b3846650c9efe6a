"""The NT-Xent loss in one process: against Algorithm 1 of the paper, in every precision, and in edge cases."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate, loss_and_gradients, relative_error, row_losses, textbook, views
from torch import Tensor, nn

from fastsimclr.loss import NTXentLoss, nt_xent, tiled, tiles
from fastsimclr.loss.tiled import tiled_backward, tiled_forward

BACKENDS = ("tiled", "reference")
both_backends = pytest.mark.parametrize("backend", BACKENDS)


# ----------------------------------------------------------------------------------------------- definition


def algorithm_1(z1: Tensor, z2: Tensor, temperature: float, decoupled: bool) -> list[float]:
    """Algorithm 1 of the paper (arXiv 2002.05709) in scalar Python; z_2k-1 and z_2k are the views of image k.

    Returns l(2k-1, 2k) for all k, then l(2k, 2k-1) for all k. decoupled: without the positive in the denominator.
    """
    z: list[list[float]] = [row for pair in zip(z1.tolist(), z2.tolist(), strict=True) for row in pair]

    def similarity(u: list[float], v: list[float]) -> float:
        dot = sum(a * b for a, b in zip(u, v, strict=True))
        return dot / (math.sqrt(sum(a * a for a in u)) * math.sqrt(sum(b * b for b in v)))

    def l(i: int, j: int) -> float:  # noqa: E743 (the paper's letter)
        denominator = 0.0
        for k in range(len(z)):
            if k != i and not (decoupled and k == j):
                denominator += math.exp(similarity(z[i], z[k]) / temperature)
        return -math.log(math.exp(similarity(z[i], z[j]) / temperature) / denominator)

    pairs = range(0, len(z), 2)
    return [l(k, k + 1) for k in pairs] + [l(k + 1, k) for k in pairs]


@both_backends
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(
    ("n", "d", "temperature"),
    [
        (2, 1, 0.5),  # the fewest images that have negatives; normalized rows of one number are +-1
        (7, 5, 0.1),
        (12, 3, 0.07),  # many similar rows in few dimensions
    ],
)
def test_loss_matches_algorithm_1_of_the_paper(
    backend: str, decoupled: bool, n: int, d: int, temperature: float
) -> None:
    z1, z2 = views(n, d)
    expected = torch.tensor(algorithm_1(z1, z2, temperature, decoupled), dtype=torch.float64)
    options: dict[str, Any] = {"backend": backend, "decoupled": decoupled}
    torch.testing.assert_close(
        nt_xent(z1, z2, temperature, reduction="none", **options), expected, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(nt_xent(z1, z2, temperature, **options), expected.mean(), rtol=1e-12, atol=1e-12)


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1 / 800])  # 1/800: 2^s overflows float64, which needs other formulas
def test_gradients_match_finite_differences(backend: str, reduction: str, decoupled: bool, temperature: float) -> None:
    z1, z2 = (z.requires_grad_() for z in views(4, 3, noise=0.02 if temperature < 0.01 else 1.0))
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)

    def loss(z1: Tensor, z2: Tensor, t: Tensor) -> Tensor:
        # Relative steps of the temperature: an absolute step of 1e-6 would be a thousandth of 1/800.
        return nt_xent(z1, z2, t * temperature, backend=backend, reduction=reduction, decoupled=decoupled)

    relative_t = (t.detach() / temperature).requires_grad_()
    assert torch.autograd.gradcheck(loss, (z1, z2, relative_t), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tile", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("n", [1, 2, 5, 8, 13])  # for tiles of 8: less than one, exactly one, several and a remainder
@pytest.mark.parametrize("temperature", [0.1, 1 / 800])
def test_sizes_that_are_not_multiples_of_the_tile(
    tile: int, n: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All positions of tile edges relative to a row, its self-pair and its positive, in both sets of formulas."""
    monkeypatch.setattr(tiles, "tile_size", lambda device: tile)
    z1, z2 = views(n, 3)
    weights = torch.linspace(-1, 2, 2 * n, dtype=torch.float64)  # distinct, to detect swapped rows
    for decoupled in (False, True)[: 1 if n == 1 else 2]:
        got = loss_and_gradients(row_losses("tiled", decoupled=decoupled), z1, z2, temperature, weights)
        exact = loss_and_gradients(row_losses("reference", decoupled=decoupled), z1, z2, temperature, weights)
        for mine, theirs in zip(got, exact, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10 / temperature)


@pytest.mark.parametrize(
    ("n", "d"),
    [
        (255, 96),  # M = 510: one tile, two rows short
        (256, 96),  # M = 512: exactly one tile
        (257, 96),  # M = 514: one full tile and two rows; the positives cross the tile edge
        (512, 33),  # M = 1024: four tiles, with every positive on the diagonal of an off-diagonal tile
        (700, 1),  # M = 1400: two tiles and a remainder; no positive on a tile's diagonal; D = 1
    ],
)
def test_sizes_around_the_default_tile(n: int, d: int) -> None:
    z1, z2 = views(n, d)
    got = loss_and_gradients(row_losses("tiled"), z1, z2, 0.1)
    exact = loss_and_gradients(row_losses("reference"), z1, z2, 0.1)
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("temperature", [0.005, 0.011, 0.0125, 0.02, 0.07, 0.5, 10.0])
@pytest.mark.parametrize("noise", [1.0, 0.2])
def test_float32_is_as_accurate_as_eager(temperature: float, noise: float) -> None:
    assert_as_accurate(row_losses("tiled"), textbook, [views(300, 64, torch.float32, noise=noise)], temperature)


@pytest.mark.parametrize("temperature", [0.005, 0.07, 10.0])
def test_float64_is_computed_in_float64(temperature: float) -> None:
    z1, z2 = views(100, 16)
    got = loss_and_gradients(row_losses("tiled"), z1, z2, temperature)
    exact = loss_and_gradients(row_losses("reference"), z1, z2, temperature)
    for mine, theirs in zip(got, exact, strict=True):
        assert relative_error(mine, theirs) < 1e-12 / min(temperature, 1)  # one rounding of s is 2e-16 / temperature


@pytest.mark.parametrize(
    ("noise", "temperature", "loss"),
    [
        (30.0, 0.02, 10.0),  # unrelated views
        (0.3, 0.1, 0.1),
        (0.15, 0.07, 1e-3),
        (0.1, 0.05, 1e-5),
    ],
)
@both_backends
def test_gradient_is_accurate_for_small_losses(backend: str, noise: float, temperature: float, loss: float) -> None:
    """Computing p_pos - 1 cancels: in float32 it gives a gradient error of 2e-2 at a loss of 1e-5."""
    z1, z2 = views(256, 128, torch.float32, noise=noise)
    exact = loss_and_gradients(row_losses("reference"), z1.double(), z2.double(), temperature)
    assert loss / 4 < exact[0].mean().item() < loss * 4, "the case does not have the intended loss"
    got = loss_and_gradients(row_losses(backend), z1, z2, temperature)
    for mine, theirs in zip(got, exact, strict=True):
        # s, up to 1/temperature, has a relative rounding error of 6e-8, and exp makes its absolute error relative.
        assert relative_error(mine, theirs) < 3e-7 / temperature


@pytest.mark.parametrize("temperature", [1 / 86, 1 / 81, 1 / 78, 1 / 60])  # below, at and above the overflow limit
@pytest.mark.parametrize("weight", [1.0, 1e-9])  # a small weight must not make g * 2^-lse subnormal
def test_collapsed_rows_near_the_overflow_of_exp(temperature: float, weight: float) -> None:
    """All rows are almost equal: every lse is 1/temperature + log M, whose exp is close to overflow."""
    random = torch.Generator().manual_seed(0)
    z1, z2 = (torch.ones(1, 32) + 0.01 * torch.randn(700, 32, generator=random) for _ in range(2))
    weights = torch.full((1400,), weight / 1400)
    got = loss_and_gradients(row_losses("tiled"), z1, z2, temperature, weights)
    eager = loss_and_gradients(textbook, z1, z2, temperature, weights)
    exact = loss_and_gradients(row_losses("reference"), z1.double(), z2.double(), temperature, weights)
    for mine, theirs, oracle in zip(got[:2], eager[:2], exact[:2], strict=True):
        assert relative_error(mine, oracle) <= 2 * relative_error(theirs, oracle) + 2**-22
    # Terms s/temperature of both signs cancel almost completely; s has a relative rounding error of 6e-8, see above.
    assert (got[2] - exact[2]).abs() < 3e-7 / temperature * weight / temperature**2


@pytest.mark.parametrize("temperature", [0.011, 0.005, 1e-3])
def test_no_overflow_at_low_temperature(temperature: float) -> None:
    """exp(1/temperature) overflows float32 below 0.0113."""
    z1, z2 = views(64, 32, torch.float32, noise=0.1)
    losses, dz, dt = loss_and_gradients(row_losses("tiled"), z1, z2, temperature)
    assert losses.isfinite().all()
    assert dz.isfinite().all()
    assert dt.isfinite()
    exact, _, _ = loss_and_gradients(row_losses("reference"), z1.double(), z2.double(), temperature)
    torch.testing.assert_close(losses, exact, rtol=1e-4, atol=1e-6 / temperature)


def test_no_underflow_of_orthogonal_rows() -> None:
    """With a fixed offset of 1/temperature, exp(s - 1/temperature) of a whole row would be 0, and its log -inf."""
    z1, z2 = (z[:, :48] * 1.0 for z in views(24, 48, torch.float32))
    z1[:], z2[:] = torch.eye(48)[:24], torch.eye(48)[24:]
    losses, dz, _ = loss_and_gradients(row_losses("tiled"), z1, z2, 0.005)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(47)))  # all similarities are 0
    assert dz.isfinite().all()


# Relative error of the gradient with bf16 products: 5e-3 at a loss of 0.1, 8e-3 near convergence.
# oneDNN may use bf16, and does on CPUs with AMX; elsewhere it computes in float32, and the bounds are loose.
@pytest.mark.parametrize(
    ("noise", "temperature", "bound"),
    [(0.3, 0.1, 8e-3), (0.15, 0.07, 1.2e-2), (0.1, 0.05, 1.2e-2)],
    ids=["loss 0.1", "loss 1e-3", "loss 1e-5"],
)
def test_medium_precision_error(noise: float, temperature: float, bound: float) -> None:
    z1, z2 = views(256, 128, torch.float32, noise=noise)
    exact = loss_and_gradients(row_losses("reference"), z1.double(), z2.double(), temperature)
    losses, dz, dt = loss_and_gradients(row_losses("tiled", precision="medium"), z1, z2, temperature)
    assert relative_error(dz, exact[1]) < bound
    assert relative_error(losses, exact[0]) < bound * 2
    assert relative_error(dt, exact[2]) < bound * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["auto", "highest"])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype, precision: str) -> None:
    """The only errors are the precision of the products and the rounding of dz to the inputs' dtype."""
    z1, z2 = views(256, 128, dtype, noise=0.3)
    exact = loss_and_gradients(row_losses("reference"), z1.double(), z2.double(), 0.1)
    losses, dz, dt = loss_and_gradients(row_losses("tiled", precision=precision), z1, z2, 0.1)
    products = 8e-3 if precision == "auto" else 1e-5
    # dz of a mean is small, and float16 has no number between 0 and 6e-8: an absolute rounding error.
    subnormal = 6e-8 / 2 * math.sqrt(dz.numel()) if dtype == torch.float16 else 0.0
    assert relative_error(losses, exact[0]) < 2 * products
    assert relative_error(dt, exact[2]) < 2 * products
    assert (dz - exact[1]).norm() < (products + torch.finfo(dtype).eps) * exact[1].norm() + subnormal
    assert nt_xent(z1, z2, precision=precision).dtype == torch.float32


def test_result_does_not_depend_on_autocast() -> None:
    """Half-precision logits would have steps of 0.008 at 10. The result must be bit-identical."""
    z1, z2 = views(300, 32, torch.float32, noise=0.3)

    def under_autocast(backend: str) -> Callable[..., Tensor]:
        def loss(*args: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return row_losses(backend)(*args)

        return loss

    for backend in BACKENDS:
        plain = loss_and_gradients(row_losses(backend), z1, z2, 0.1)
        automatic = loss_and_gradients(under_autocast(backend), z1, z2, 0.1)
        for a, b in zip(plain, automatic, strict=True):
            assert torch.equal(a, b), backend
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert nt_xent(z1, z2, backend=backend).dtype == torch.float32

    plain = loss_and_gradients(row_losses("tiled"), z1, z2, 0.1)
    with torch.autocast(
        "cpu", dtype=torch.bfloat16
    ):  # PyTorch advises against a backward under autocast; this one is safe
        automatic = loss_and_gradients(row_losses("tiled"), z1, z2, 0.1)
    for a, b in zip(plain, automatic, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("setting", ["medium", "high", "highest"])
def test_global_matmul_precision_does_not_affect_highest_and_is_restored(setting: str) -> None:
    z1, z2 = views(300, 64, torch.float32, noise=0.3)
    plain = loss_and_gradients(row_losses("tiled"), z1, z2, 0.1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        fp32_precision = torch.backends.mkldnn.matmul.fp32_precision
        changed = loss_and_gradients(row_losses("tiled", precision="highest"), z1, z2, 0.1)
        nt_xent(z1, z2, precision="medium")
        with pytest.raises(RuntimeError, match="a failure inside"):
            fail_inside(z1, z2)
        assert torch.get_float32_matmul_precision() == setting
        assert torch.backends.mkldnn.matmul.fp32_precision == fp32_precision
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(plain, changed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("precision", "expected"), [("highest", "ieee"), ("medium", "bf16")])
def test_precision_sets_the_matmul_precision(precision: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded inside both passes, since on many CPUs it does not change the results."""
    seen = []

    def spy_on(function: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any, **options: Any) -> Any:
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return function(*args, **options)

        return spy

    for name in ("log_sums", "gradients"):
        monkeypatch.setattr(tiled, name, spy_on(getattr(tiled, name)))
    z1, z2 = (z.requires_grad_() for z in views(4, 4, torch.float32))
    nt_xent(z1, z2, backend="tiled", precision=precision).backward()
    assert seen == [expected] * 2


def fail_inside(z1: Tensor, z2: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def log_sums(*_: object, **__: object) -> None:
            raise RuntimeError("a failure inside")

        patch.setattr(tiled, "log_sums", log_sums)
        nt_xent(z1, z2, precision="medium")


@pytest.mark.parametrize(
    ("device", "matmul", "every_operator", "medium"),
    [
        ("cpu", torch.backends.mkldnn.matmul, torch.backends.mkldnn, "bf16"),
        ("cuda", torch.backends.cuda.matmul, torch.backends.cudnn, "tf32"),  # the settings need no GPU
    ],
)
def test_matmul_precision_of_the_device_is_set_and_restored(
    device: str, matmul: Any, every_operator: Any, medium: str
) -> None:
    before = matmul.fp32_precision, every_operator.fp32_precision
    try:
        for own in ("none", "ieee"):  # none: inherited from the setting for all operators
            matmul.fp32_precision, every_operator.fp32_precision = own, medium
            for precision, expected in (("highest", "ieee"), ("medium", medium)):
                with tiles.matmul_precision(precision, torch.device(device)):
                    assert matmul.fp32_precision == expected
            assert matmul.fp32_precision == (medium if own == "none" else own)
            every_operator.fp32_precision = "ieee"
            assert matmul.fp32_precision == "ieee", "inherits as before, or keeps its own value"
    finally:
        matmul.fp32_precision, every_operator.fp32_precision = before


# ----------------------------------------------------------------------------------------------- edges of the input


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_zero_rows_have_the_loss_and_gradient_of_normalize(temperature: float) -> None:
    """F.normalize maps them to 0 (all similarities 0), and its gradient is dz^/eps: huge, as in PyTorch."""
    z1, z2 = views(5, 4)
    z1[1] = 0
    z2[1] = 0  # a zero row with a zero positive
    z1[3] = 0
    z2[4] = 1e-14  # not 0, but below F.normalize's eps
    got = loss_and_gradients(row_losses("tiled"), z1, z2, temperature)
    exact = loss_and_gradients(row_losses("reference"), z1, z2, temperature)
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "huge"), [(torch.float64, 1e30), (torch.float32, 1e18)])
def test_huge_row_counts_only_by_its_direction(dtype: torch.dtype, huge: float) -> None:
    z1, z2 = views(6, 8, dtype)
    big = z1.clone()
    big[2] *= huge
    small, dz_small, _ = loss_and_gradients(row_losses("tiled"), z1, z2, 0.1)
    large, dz_large, _ = loss_and_gradients(row_losses("tiled"), big, z2, 0.1)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(large, small, **tolerance)
    dz_large[2] *= huge
    torch.testing.assert_close(dz_large, dz_small, **tolerance)


@both_backends
def test_loss_and_gradient_of_one_image_are_zero(backend: str) -> None:
    for temperature in (0.1, 0.005):
        losses, dz, dt = loss_and_gradients(row_losses(backend), *views(1, 4, torch.float32), temperature)
        assert losses.tolist() == [0, 0]
        assert dz.abs().max() == 0
        assert dt == 0


@both_backends
def test_result_does_not_depend_on_the_memory_layout(backend: str) -> None:
    z1, z2 = views(6, 4)
    expected = loss_and_gradients(row_losses(backend), z1, z2, 0.1)

    wide = torch.zeros(6, 9, dtype=torch.float64)
    wide[:, ::2][:, :4] = z1
    layouts = [(wide[:, :8:2], z2.T.contiguous().T), (z1.flip(0).contiguous().flip(0), torch.stack([z1, z2])[1])]
    for a, b in layouts:
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        losses = nt_xent(a, b, backend=backend, reduction="none")
        assert torch.equal(losses, expected[0])
        assert torch.equal(torch.cat(torch.autograd.grad(losses.mean(), (a, b))), expected[1])

    row = z1[:1].clone().requires_grad_()  # expanded: stride 0, and all images equal
    copies = z1[:1].repeat(6, 1).requires_grad_()
    a = nt_xent(row.expand(6, 4), z2, backend=backend)
    b = nt_xent(copies, z2, backend=backend)
    torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    (da,), (db,) = torch.autograd.grad(a, row), torch.autograd.grad(b, copies)
    torch.testing.assert_close(da, db.sum(0, keepdim=True), rtol=1e-12, atol=1e-14)


@both_backends
def test_same_tensor_as_both_views_gets_both_gradients(backend: str) -> None:
    z = views(6, 4)[0].requires_grad_()
    a, b = (z.detach().clone().requires_grad_() for _ in range(2))
    (dz,) = torch.autograd.grad(nt_xent(z, z, backend=backend), z)
    da, db = torch.autograd.grad(nt_xent(a, b, backend=backend), (a, b))
    torch.testing.assert_close(dz, da + db, rtol=1e-14, atol=1e-16)


@both_backends
def test_gradient_for_one_view_or_none(backend: str) -> None:
    z1, z2 = views(6, 4)
    _, exact, _ = loss_and_gradients(row_losses(backend), z1, z2, 0.1)
    z2.requires_grad_()
    loss = nt_xent(z1, z2, backend=backend)  # as with a momentum encoder's z1
    torch.testing.assert_close(torch.autograd.grad(loss, z2)[0], exact[6:], rtol=1e-14, atol=1e-16)
    with torch.no_grad():
        without_grad = nt_xent(z1, z2, backend=backend)
    assert not without_grad.requires_grad
    assert torch.equal(without_grad, loss)
    with torch.inference_mode():
        assert torch.equal(nt_xent(z1, z2, backend=backend), loss)


@both_backends
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
@pytest.mark.parametrize("n", [1, 5])
def test_non_finite_projections_give_a_non_finite_loss(
    backend: str, value: float, view: int, temperature: float, n: int
) -> None:
    both = views(n, 4, torch.float32)
    both[view][-1, 2] = value
    assert not nt_xent(*both, temperature, backend=backend).isfinite()


def test_results_are_bit_identical_across_calls() -> None:
    z1, z2 = views(700, 64, torch.float32)
    for temperature in (0.1, 0.005):
        first = loss_and_gradients(row_losses("tiled"), z1, z2, temperature)
        again = loss_and_gradients(row_losses("tiled"), z1, z2, temperature)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


def test_inputs_and_saved_tensors_are_not_modified() -> None:
    both = [z.requires_grad_() for z in views(5, 4)]
    before = [z.detach().clone() for z in both]
    loss = nt_xent(*both)
    first = torch.autograd.grad(loss, both, retain_graph=True)
    second = torch.autograd.grad(loss, both)  # the first backward did not modify the saved tensors
    for z, old, a, b in zip(both, before, first, second, strict=True):
        assert torch.equal(z, old)
        assert torch.equal(a, b)


def test_self_pair_is_masked_and_not_subtracted() -> None:
    """sum(exp) - exp(1/temperature) loses the negatives next to e^50, and its gradient leaks through the self-pair."""
    z = torch.eye(4)
    z1, z2 = z[:2].contiguous(), z[2:].contiguous()  # all similarities 0: each row has three terms of exp(0)
    losses, dz, _ = loss_and_gradients(row_losses("tiled"), z1, z2, 0.02)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(3)), rtol=1e-6, atol=0)
    # dz_i = 1/(M t) * [2/3 of each negative - 4/3 of the positive], and 0 along z_i.
    eye = torch.eye(4, dtype=torch.float64)
    expected = (2 / 3 * (1 - eye) - 2 * eye.roll(2, 1)) / (4 * 0.02)
    torch.testing.assert_close(dz, expected, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------- interface


@both_backends
def test_temperature_is_a_float_a_tensor_or_a_learned_parameter(backend: str) -> None:
    z1, z2 = views(6, 4, torch.float32)
    expected = nt_xent(z1, z2, 0.2, backend=backend)
    for temperature in (torch.tensor(0.2), nn.Parameter(torch.tensor(0.2)), torch.tensor(0.2, dtype=torch.float64)):
        torch.testing.assert_close(nt_xent(z1, z2, temperature, backend=backend), expected, rtol=1e-6, atol=0)

    module = NTXentLoss(nn.Parameter(torch.tensor(0.2, dtype=torch.float64)), backend=backend)
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    module(z1, z2).backward()
    assert isinstance(module.temperature, nn.Parameter)
    assert module.temperature.grad is not None
    assert module.temperature.grad.dtype == torch.float64
    loss = [nt_xent(z1.double(), z2.double(), t, backend=backend).item() for t in (0.2 - 1e-5, 0.2 + 1e-5)]
    assert module.temperature.grad.item() == pytest.approx((loss[1] - loss[0]) / 2e-5, rel=1e-5)


def test_module_matches_the_function() -> None:
    z1, z2 = views(6, 4, torch.float32)
    for options in (
        {},
        {"reduction": "none", "decoupled": True},
        {"backend": "reference"},
        {"precision": "medium", "backend": "tiled"},
        {"group": "world"},  # torch.distributed is not initialized: only this process
    ):
        assert torch.equal(NTXentLoss(0.3, **options)(z1, z2), nt_xent(z1, z2, 0.3, **options))
    assert "temperature=0.3" in repr(NTXentLoss(0.3))
    assert "learned" in repr(NTXentLoss(nn.Parameter(torch.tensor(0.3))))


GOOD = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((GOOD, torch.ones(5, 3)), {}, "same shape"),
        ((GOOD, torch.ones(4, 2)), {}, "same shape"),
        ((GOOD, GOOD.double()), {}, "dtype"),
        ((GOOD, torch.ones(4, 3, device="meta")), {}, "device"),
        ((GOOD[0], GOOD[0]), {}, r"z1.*\(3,\).*expected \(N, D\)"),
        ((GOOD, GOOD[None]), {}, r"z2.*\(1, 4, 3\)"),
        ((GOOD[:0], GOOD[:0]), {}, r"\(0, 3\)"),
        ((GOOD[:, :0], GOOD[:, :0]), {}, r"\(4, 0\)"),
        ((GOOD.int(), GOOD.int()), {}, r"z1.*int32"),
        ((GOOD, GOOD.to(torch.float8_e4m3fn)), {}, r"z2.*float8"),
        ((GOOD.to(torch.complex64),) * 2, {}, "complex64"),
        ((GOOD.tolist(), GOOD), {}, "z1.*list"),
        ((GOOD, GOOD, 0.0), {}, "temperature"),
        ((GOOD, GOOD, -0.1), {}, "temperature.*-0.1"),
        ((GOOD, GOOD, math.nan), {}, "temperature"),
        ((GOOD, GOOD, math.inf), {}, "temperature"),
        ((GOOD, GOOD, torch.tensor(0.0)), {}, "temperature"),
        ((GOOD, GOOD, torch.tensor([0.1])), {}, "temperature.*0-dim"),
        ((GOOD, GOOD, torch.tensor(1)), {}, "temperature.*int64"),
        ((GOOD, GOOD), {"backend": "cuda"}, "backend.*'cuda'"),
        ((GOOD, GOOD), {"reduction": "sum"}, "reduction.*'sum'"),
        ((GOOD, GOOD), {"precision": "low"}, "precision.*'low'"),
        ((GOOD, GOOD), {"group": "everyone"}, "group.*'everyone'"),
        ((GOOD, GOOD), {"group": 3}, "group.*int"),
        ((GOOD[:1], GOOD[:1]), {"decoupled": True}, "decoupled"),
    ],
)
def test_invalid_arguments_raise(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(*arguments, **options)


# ----------------------------------------------------------------------------------------------- operators, compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [True, False])
# opcheck itself reads .grad of non-leaf tensors; PyTorch ignores that warning unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_operators_pass_opcheck(dtype: torch.dtype, mean: bool) -> None:
    z1, z2 = (z.requires_grad_() for z in views(5, 4, dtype))
    t = torch.tensor(0.2, requires_grad=True)
    torch.library.opcheck(tiled_forward, (z1, z2, t, "", mean, False, "highest", 0.2))
    loss, *saved = (x.detach() for x in tiled_forward(z1, z2, t, "", mean, False, "highest", 0.2))
    torch.library.opcheck(tiled_backward, (torch.ones_like(loss), *saved, t.detach(), "", "highest", 0.2))


@both_backends
@pytest.mark.parametrize("temperature", ["float", "learned"])
@pytest.mark.slow
def test_compiles_into_one_graph(backend: str, temperature: str) -> None:
    torch.compiler.reset()
    layer = nn.Linear(4, 4, dtype=torch.float64)

    def step(x1: Tensor, x2: Tensor, t: float | Tensor) -> Tensor:
        return nt_xent(layer(x1), layer(x2), t, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (6, 9):  # the second size makes the graph dynamic
        x1, x2 = views(n, 4)
        results = []
        for run in (step, compiled):
            layer.zero_grad()
            t = nn.Parameter(torch.tensor(0.2, dtype=torch.float64)) if temperature == "learned" else 0.2
            loss = run(x1, x2, t)
            loss.backward()
            results.append([loss.detach(), layer.weight.grad] + ([t.grad] if isinstance(t, nn.Parameter) else []))
        for plain, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, plain, rtol=1e-12, atol=1e-14)


def test_memory_is_linear_in_the_batch(tmp_path: Path) -> None:
    """M = 8192: a similarity matrix would take 256 MiB; the peak above the inputs is below 64 MiB."""
    z1, z2 = (z.requires_grad_() for z in views(4096, 128, torch.float32))
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        nt_xent(z1, z2, backend="tiled").backward()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    allocated, peak = 0, 0
    for event in sorted(events, key=lambda event: event["args"]["Ev Idx"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    assert 2 * z1.nbytes < peak, "the profiler did not see the allocations"
    assert peak <= 64 * 2**20
