"""SupCon: against the paper's formula, finite differences, and NT-Xent where every label occurs twice."""

import math
from typing import Any

import pytest
import torch
from oracle import close, needs_emulation, views
from torch import Tensor, nn

from benchmarks.memory import peak_mib
from fastsimclr.loss import SupConLoss, nt_xent, sup_con, tiles

pytestmark = pytest.mark.usefixtures("one_thread")
both_backends = pytest.mark.parametrize("backend", ["tiled", "reference"])
LABELS = torch.tensor([4, -1, 4, 7, 4, -1, 1 << 40, -1])  # classes of 3, 3, 1 and 1 rows, in no order


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.cat(views(4, 5, dtype))


def in_scalars(z: Tensor, labels: Tensor, temperature: float) -> list[float]:
    """L_out of eq. 2 of the paper (arXiv 2004.11362) in scalar Python; 0 for a row without positives."""
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in z.tolist()]
    losses = []
    for i, row in enumerate(unit):
        s = [sum(p * q for p, q in zip(row, other, strict=True)) / temperature for other in unit]
        denominator = sum(math.exp(x) for j, x in enumerate(s) if j != i)
        positives = [j for j in range(len(unit)) if j != i and labels[j] == labels[i]]
        terms = [math.log(math.exp(s[p]) / denominator) for p in positives]
        losses.append(-sum(terms) / len(terms) if terms else 0.0)
    return losses


@both_backends
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_loss_matches_the_formula_of_the_paper(backend: str, temperature: float) -> None:
    expected = torch.tensor(in_scalars(rows(), LABELS, temperature), dtype=torch.float64)
    assert (expected[[3, 6]] == 0).all()
    close(sup_con(rows(), LABELS, temperature, backend=backend, reduction="none"), expected)
    close(sup_con(rows(), LABELS, temperature, backend=backend), expected.mean())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    got = sup_con(rows()[order], LABELS[order], temperature, backend=backend, reduction="none")
    close(got, expected[order])


@both_backends
@pytest.mark.parametrize("temperature", [0.1, 1 / 800])  # 1/800: exponentials overflow float64
def test_gradients_match_finite_differences(backend: str, temperature: float) -> None:
    relative_t = torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss(z: Tensor, relative_t: Tensor) -> Tensor:
        return sup_con(z, LABELS, relative_t * temperature, backend=backend, reduction="none")

    assert torch.autograd.gradcheck(loss, (rows().requires_grad_(), relative_t), eps=1e-6, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [1, 3, 8])
def test_sizes_that_are_not_multiples_of_the_tile(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "tile_size", lambda device: tile)
    weights = torch.linspace(-1, 2, 8, dtype=torch.float64)
    results = []
    for backend in ("tiled", "reference"):
        z = rows().requires_grad_()
        losses = sup_con(z, LABELS, backend=backend, reduction="none")
        results.append([losses.detach(), *torch.autograd.grad(losses @ weights, z)])
    for mine, theirs in zip(*results, strict=True):
        close(mine, theirs, 1e-10)


@pytest.mark.parametrize("backend", ["tiled", pytest.param("emulated", marks=needs_emulation)])
@pytest.mark.parametrize(("precision", "bound"), [("highest", 2e-4), ("medium", 3e-2)])
def test_float32_is_near_the_oracle(backend: str, precision: str, bound: float) -> None:
    z = torch.cat(views(65, 40))  # 130 rows: one full tile of the kernels and two rows
    labels = torch.arange(130) % 9
    leaves = [z.float().requires_grad_(), z.requires_grad_()]
    results = []
    for leaf, name in zip(leaves, (backend, "reference"), strict=True):
        loss = sup_con(leaf, labels, backend=name, precision=precision)
        results.append([loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() < bound * theirs.norm()


@both_backends
def test_equals_nt_xent_if_every_label_occurs_twice(backend: str) -> None:
    z1, z2 = views(6, 5)
    got = sup_con(torch.cat([z1, z2]), torch.arange(6).repeat(2), 0.2, backend=backend, reduction="none")
    close(got, nt_xent(z1, z2, 0.2, backend="reference", reduction="none"))


def test_one_class_and_no_positives() -> None:
    z = rows()
    assert sup_con(z, torch.arange(8)).item() == 0
    unrelated = sup_con(z.requires_grad_(), torch.arange(8))
    unrelated.backward()
    assert z.grad is not None
    assert (z.grad == 0).all()
    same = torch.ones(8, 5, dtype=torch.float64)
    close(sup_con(same, torch.zeros(8, dtype=torch.int64)), torch.tensor(math.log(7), dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z": torch.ones(3)}, r"z: got shape \(3,\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels: got torch.int64 \(3,\), expected a tensor of 2"),
        ({"labels": torch.zeros(2)}, r"labels: got torch.float32 \(2,\)"),
        ({"labels": [0, 1]}, "labels: got list"),
        ({"z": torch.ones(1, 3), "labels": torch.zeros(1, dtype=torch.int64)}, "z: got N = 1"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
    ],
)
def test_invalid_arguments_raise(options: dict[str, Any], message: str) -> None:
    arguments = {"z": torch.ones(2, 3), "labels": torch.zeros(2, dtype=torch.int64)} | options
    with pytest.raises(ValueError, match=message):
        sup_con(**arguments)


def test_module_learns_its_temperature() -> None:
    criterion = SupConLoss(nn.Parameter(torch.tensor(0.3, dtype=torch.float64)))
    loss = criterion(rows(), LABELS)
    close(loss, sup_con(rows(), LABELS, 0.3))
    loss.backward()
    (temperature,) = criterion.parameters()
    assert temperature.grad is not None
    assert "temperature=learned" in repr(criterion)


@both_backends
@pytest.mark.slow
def test_compiles_into_one_graph(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(sup_con, fullgraph=True, backend="aot_eager")
    close(compiled(rows(), LABELS, 0.2, backend=backend), sup_con(rows(), LABELS, 0.2, backend=backend))


@pytest.mark.slow
def test_memory_is_linear_in_the_batch() -> None:
    """A matrix of 4096 x 4096 would take 64 MiB, also one of rows and classes; z takes 2 MiB."""
    z = torch.cat(views(2048, 128, torch.float32)).requires_grad_()
    peak = peak_mib(lambda: sup_con(z, torch.arange(2048).repeat(2), backend="tiled").backward())
    assert 4 < peak < 40
