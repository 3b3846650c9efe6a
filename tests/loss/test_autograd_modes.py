"""Every mode of differentiation, for every backend: as the float64 oracle, or RuntimeError with what to use instead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import views
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from fastsimclr._extension import why_unavailable
from fastsimclr.loss import nt_xent

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),  # PyTorch's own jvp formulas
]

EMULATED = pytest.param(
    "emulated", marks=pytest.mark.skipif(bool(why_unavailable(torch.device("cpu"))), reason="needs emulated kernels")
)
OPERATORS = ["tiled", EMULATED]
Loss = Callable[..., Tensor]
Mode = Callable[[Loss, Tensor, Tensor], Tensor]  # (loss of z and options, z, direction) -> value or derivatives


def dual(loss: Loss, z: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(z, v))).tangent
        assert tangent is not None
        return tangent.clone()


def dual_through_backward(loss: Loss, z: Tensor, v: Tensor) -> Tensor:
    """The tangent of dz, which is linear in the gradient of the loss."""
    z = z.clone().requires_grad_()
    value = loss(z)
    with forward_ad.dual_level():
        (dz,) = torch.autograd.grad(value, z, forward_ad.make_dual(torch.ones_like(value), v.sum().to(value.dtype)))
        tangent = forward_ad.unpack_dual(dz).tangent
        assert tangent is not None
        return tangent.clone()


def double_backward(loss: Loss, z: Tensor, v: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    (dz,) = torch.autograd.grad(loss(z), z, create_graph=True)
    return torch.autograd.grad((dz * v).sum(), z)[0]


def batched_backward(loss: Loss, z: Tensor, v: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    losses = loss(z, reduction="none")
    return torch.autograd.grad(losses, z, torch.eye(len(losses), dtype=losses.dtype), is_grads_batched=True)[0]


def backward(loss: Loss, z: Tensor, v: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0]


def checkpointed(loss: Loss, z: Tensor, v: Tensor) -> Tensor:
    return backward(lambda z: torch.utils.checkpoint.checkpoint(loss, z, use_reentrant=False), z, v)


def over_temperatures(loss: Loss, z: Tensor, v: Tensor) -> Tensor:
    return vmap(lambda temperature: loss(z, temperature=temperature))(torch.tensor([0.05, 0.5], dtype=z.dtype))


def samples(z: Tensor, v: Tensor) -> Tensor:
    return torch.stack([z, z + v, v])


SUPPORTED: dict[str, Mode] = {  # by all backends
    "backward": backward,
    "is_grads_batched": batched_backward,
    "checkpoint": checkpointed,
    "vmap": lambda loss, z, v: vmap(loss)(samples(z, v)),
    "vmap of another dimension": lambda loss, z, v: vmap(loss, in_dims=1)(samples(z, v).transpose(0, 1)),
    "vmap over temperatures": over_temperatures,
    "vmap of vmap": lambda loss, z, v: vmap(vmap(loss))(torch.stack([samples(z, v), samples(v, z)])),
}
DIFFERENTIATING: dict[str, Mode] = {  # by the reference
    "jvp": lambda loss, z, v: jvp(loss, (z,), (v,))[1],
    "jvp of the temperature": lambda loss, z, v: jvp(
        lambda t: loss(z, temperature=t), (torch.tensor(0.2, dtype=z.dtype),), (v[0, 0],)
    )[1],
    "jvp of vmap": lambda loss, z, v: jvp(vmap(loss), (samples(z, v),), (samples(v, z),))[1],
    "vmap of jvp": lambda loss, z, v: vmap(lambda w: jvp(loss, (z,), (w,))[1])(samples(z, v)),
    "jacfwd": lambda loss, z, v: jacfwd(loss)(z),
    "jacrev": lambda loss, z, v: jacrev(loss)(z),
    "hessian": lambda loss, z, v: hessian(loss)(z),
    "vjp": lambda loss, z, v: vjp(loss, z)[1](v.sum().to(torch.promote_types(z.dtype, torch.float32)))[0],
    "grad": lambda loss, z, v: grad(loss)(z),
    "grad of grad": lambda loss, z, v: grad(lambda z: (grad(loss)(z) * v).sum())(z),
    "vmap of grad": lambda loss, z, v: vmap(grad(loss))(samples(z, v)),
    "forward AD": dual,
    "forward AD through backward": dual_through_backward,
    "double backward": double_backward,
}


def run(mode: Mode, backend: str, dtype: torch.dtype) -> Tensor:
    z1, z2 = views(4, 3, dtype)
    direction = views(4, 3, dtype, seed=1)[0]

    def loss(z: Tensor, temperature: Any = 0.2, reduction: str = "mean") -> Tensor:
        return nt_xent(z, z2, temperature, backend=backend, reduction=reduction)

    return mode(loss, z1, direction).detach().double()


def finite_difference(z: Tensor, z2: Tensor, v: Tensor) -> float:
    step = 1e-6
    losses = [nt_xent(z + sign * step * v, z2, 0.2, backend="reference").item() for sign in (1, -1)]
    return (losses[0] - losses[1]) / (2 * step)


def test_forward_mode_of_the_oracle_matches_finite_differences() -> None:
    z1, z2 = views(4, 3)
    v = views(4, 3, seed=1)[0]
    assert run(DIFFERENTIATING["jvp"], "reference", torch.float64).item() == pytest.approx(
        finite_difference(z1, z2, v), rel=1e-6
    )


@pytest.mark.parametrize("backend", ["reference", *OPERATORS])
@pytest.mark.parametrize("mode", SUPPORTED)
def test_supported_modes_match_the_oracle(mode: str, backend: str) -> None:
    exact = run(SUPPORTED[mode], "reference", torch.float64)
    got = run(SUPPORTED[mode], backend, torch.float32)
    torch.testing.assert_close(got, exact, rtol=2e-4, atol=2e-4 * exact.abs().max().item())  # emulated: 16 bits


@pytest.mark.parametrize("mode", DIFFERENTIATING)
def test_reference_has_all_modes(mode: str) -> None:
    exact = run(DIFFERENTIATING[mode], "reference", torch.float64)
    got = run(DIFFERENTIATING[mode], "reference", torch.float32)
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("backend", OPERATORS)
@pytest.mark.parametrize("mode", DIFFERENTIATING)
def test_other_modes_raise_and_name_what_to_use(mode: str, backend: str) -> None:
    with pytest.raises(RuntimeError, match=r'^loss: got .*backend "(tiled|fused)".*use .*backend="reference"'):
        run(DIFFERENTIATING[mode], backend, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("backend", OPERATORS)
def test_compiled_modes(backend: str) -> None:
    z1, z2 = views(4, 3, torch.float32)
    v = views(4, 3, torch.float32, seed=1)[0]

    def loss(z: Tensor) -> Tensor:
        return nt_xent(z, z2, 0.2, backend=backend)

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, backend="aot_eager")

    plain = compiled(loss)
    torch.testing.assert_close(plain(z1), loss(z1))
    with pytest.raises(Exception, match=r'use .*backend="reference"'):  # it must not reuse the graph compiled above
        dual(plain, z1, v)
    torch.testing.assert_close(compiled(vmap(loss))(z1[None]), loss(z1)[None])
    for mode in ("jvp", "grad", "vmap of jvp", "forward AD"):
        with pytest.raises(Exception, match=r'use .*backend="reference"'):  # Dynamo wraps some errors in its own
            compiled(lambda z, v, mode=mode: DIFFERENTIATING[mode](loss, z, v))(z1, v)
