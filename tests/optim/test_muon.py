"""Muon: against PyTorch's for matrices, and PyTorch's AdamW for the other parameters."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fastsimclr.optim import Muon
from fastsimclr.optim.muon import orthogonalize

# PyTorch's Muon multiplies in bf16 everywhere, ours in float32 on a CPU without bf16 units. The error of five steps of
# three products, each rounded by up to 2^-9:
BF16 = 15 * 2.0**-9


def gradients(shape: tuple[int, ...], count: int = 4) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def run(optimizer: torch.optim.Optimizer, p: Tensor, grads: Tensor) -> Tensor:
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, BF16), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(6, 6), (4, 40), (40, 4), (1, 9), (9, 1)])
def test_orthogonalize_moves_singular_values_to_one_and_keeps_the_singular_vectors(
    shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    matrices = gradients(shape, 3).to(dtype)
    got = orthogonalize(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    singular = torch.linalg.svdvals(got)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    inside = u.mT @ got @ vh.mT  # diagonal if the singular vectors are those of the input
    off = inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < bound
    assert (orthogonalize(torch.zeros(1, *shape)) == 0).all()


@pytest.mark.parametrize("shape", [(6, 8), (16, 4)])
def test_matrices_are_updated_as_by_pytorchs_muon(shape: tuple[int, int]) -> None:
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    expected = run(torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options), theirs, gradients(shape))  # type: ignore[arg-type]
    got = run(Muon([ours], **options), ours, gradients(shape))
    assert (got - expected).norm() < BF16 * (expected - 1).norm()


def test_a_convolution_is_the_matrix_of_its_weights() -> None:
    conv = nn.Parameter(torch.ones(5, 3, 2, 2).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(torch.ones(5, 12))
    grads = gradients((5, 3, 2, 2))
    got = run(Muon([conv], 0.1, weight_decay=0.1), conv, grads.to(memory_format=torch.contiguous_format))
    expected = run(Muon([matrix], 0.1, weight_decay=0.1), matrix, grads.flatten(2))
    torch.testing.assert_close(got.flatten(1), expected, rtol=1e-6, atol=1e-6)


def test_taps_without_a_gradient_change_nothing_and_are_not_changed() -> None:
    """A 3x3 kernel over one pixel has a gradient at its center only, and is updated as a 1x1 kernel."""
    kernel, center = nn.Parameter(torch.ones(4, 6, 3, 3)), nn.Parameter(torch.ones(4, 6))
    grads = gradients((4, 6))
    padded = torch.zeros(len(grads), 4, 6, 3, 3)
    padded[..., 1, 1] = grads
    got = run(Muon([kernel], 0.1), kernel, padded)
    torch.testing.assert_close(got[..., 1, 1], run(Muon([center], 0.1), center, grads), rtol=1e-5, atol=1e-6)
    outside = got.clone()
    outside[..., 1, 1] = 1
    assert (outside == 1).all()


def test_other_parameters_are_updated_as_by_adamw() -> None:
    names = ("bias", "scale")
    ours, theirs = ({name: nn.Parameter(torch.ones(5)) for name in names} for _ in range(2))
    weight = nn.Parameter(torch.ones(5, 4))
    muon = Muon([weight, *ours.values()], 0.1, 0.8, 0.3)
    adamw = torch.optim.AdamW(theirs.values(), 0.1, betas=(0.8, 0.999), weight_decay=0.0)
    for optimizer, parameters in ((muon, ours), (adamw, theirs)):
        for step, grad in enumerate(gradients((5,))):
            for index, p in enumerate(parameters.values()):
                p.grad = grad * (index + 1) if step else None  # no gradient: not updated
            optimizer.step()
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
    assert (weight == 1).all()


def test_excluded_matrices_take_adamw() -> None:
    excluded, twin = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    got = run(Muon([excluded], 0.1, exclude=lambda p: p is excluded), excluded, gradients((3, 4)))
    expected = run(torch.optim.AdamW([twin], 0.1, betas=(0.95, 0.999), weight_decay=0.0), twin, gradients((3, 4)))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_resumes_from_its_state_bit_for_bit() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = gradients((3, 8, 8), 6)

    def train(model: nn.Module, optimizer: Muon, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    first = Muon(model.parameters(), 0.01, weight_decay=0.1)
    train(model, first, 2)
    resumed = copy.deepcopy(model)
    second = Muon(resumed.parameters(), 0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(model, first, 2)
    train(resumed, second, 2)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_closure_and_invalid_values() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([p], 0.1)

    def closure() -> float:
        p.grad = torch.eye(2)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert not torch.equal(p, torch.ones(2, 2))
    for options in ({"lr": -1.0}, {"lr": math.nan}, {"lr": 0.1, "momentum": 1.0}, {"lr": 0.1, "weight_decay": -0.1}):
        with pytest.raises(ValueError, match="expected finite numbers >= 0"):
            Muon([p], **options)
    with pytest.raises(ValueError, match="got an empty list"):
        Muon([], 0.1)
