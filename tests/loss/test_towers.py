"""InfoNCE: against the papers' formulas, finite differences, and eager PyTorch in the same precision."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, close, loss_and_gradients, needs_emulation, textbook_towers, views
from torch import Tensor, nn

from benchmarks.memory import peak_mib
from fastsimclr.loss import InfoNCELoss, info_nce, nt_xent, tiles
from fastsimclr.loss.log_sums import log_sums_backward, log_sums_forward

pytestmark = pytest.mark.usefixtures("one_thread")
both_backends = pytest.mark.parametrize("backend", ["tiled", "reference"])
UNSAFE = 1 / 800  # at this temperature exponentials overflow float64, which needs other formulas


# ----------------------------------------------------------------------------------------------- definition


def in_scalars(
    a: Tensor, b: Tensor, queue: Tensor, temperature: float, decoupled: bool, hardness: float
) -> list[float]:
    """The loss of each row of a among the rows of b and the queue, in scalar Python.

    CPC (arXiv 1807.03748), eq. 4, of which CLIP's is the mean of both directions; MoCo (arXiv 1911.05722), eq. 1, has
    the queue; DCL (arXiv 2110.06848), eq. 6; hard negatives (arXiv 2010.04592), eq. 4 with tau+ = 0: N times the mean
    of the exponentials, weighted by their power of beta.
    """

    def similarity(u: list[float], v: list[float]) -> float:
        dot = sum(p * q for p, q in zip(u, v, strict=True))
        return dot / (math.sqrt(sum(p * p for p in u)) * math.sqrt(sum(q * q for q in v)))

    losses = []
    for i, row in enumerate(a.tolist()):
        others = [other for j, other in enumerate(b.tolist()) if j != i] + queue.tolist()
        exponentials = [math.exp(similarity(row, other) / temperature) for other in others]
        weights = [e**hardness for e in exponentials]
        negatives = sum(w * e for w, e in zip(weights, exponentials, strict=True)) * len(others) / sum(weights)
        positive = math.exp(similarity(row, b[i].tolist()) / temperature)
        losses.append(-math.log(positive / (negatives + (0 if decoupled else positive))))
    return losses


@both_backends
@pytest.mark.parametrize("hardness", [0.0, 0.7])
@pytest.mark.parametrize("decoupled", [False, True])
def test_loss_matches_the_formulas_of_the_papers(backend: str, decoupled: bool, hardness: float) -> None:
    a, b = views(7, 5)
    queue = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"backend": backend, "decoupled": decoupled, "hardness": hardness, "reduction": "none"}
    formula = (0.2, decoupled, hardness)
    one_way = torch.tensor(in_scalars(a, b, queue[:0], *formula), dtype=torch.float64)
    other_way = torch.tensor(in_scalars(b, a, queue[:0], *formula), dtype=torch.float64)
    with_queue = torch.tensor(in_scalars(a, b, queue, *formula), dtype=torch.float64)
    close(info_nce(a, b, 0.2, symmetric=False, **options), one_way)
    close(info_nce(a, b, 0.2, **options), torch.cat([one_way, other_way]))
    close(info_nce(a, b, 0.2, symmetric=False, queue=queue, **options), with_queue)
    for i in range(len(a)):  # a single row has no negatives in its batch
        only_queue = in_scalars(a[i : i + 1], b[i : i + 1], queue, *formula)
        got = info_nce(a, b, 0.2, symmetric=False, queue=queue, batch_negatives=False, **options)[i]
        close(got, torch.tensor(only_queue[0], dtype=torch.float64))
    options["reduction"] = "mean"
    close(info_nce(a, b, 0.2, **options), (one_way.mean() + other_way.mean()) / 2)
    close(info_nce(a, b, 0.2, symmetric=False, queue=queue, **options), with_queue.mean())


@both_backends
@pytest.mark.parametrize("hardness", [0.0, 0.7])
@pytest.mark.parametrize("decoupled", [False, True])
def test_hard_negatives_of_nt_xent_match_the_formula_of_the_paper(
    backend: str, decoupled: bool, hardness: float
) -> None:
    """Each row among all views: its positive is a row of the other batch, its negatives are all other rows of both."""
    z1, z2 = views(6, 5)
    rows = torch.cat([z1, z2])
    expected = []
    for i, positive in enumerate(torch.cat([z2, z1])):
        negatives = torch.stack([row for j, row in enumerate(rows) if j not in (i, (i + 6) % 12)])
        expected += in_scalars(rows[i : i + 1], positive[None], negatives, 0.2, decoupled, hardness)
    got = nt_xent(z1, z2, 0.2, backend=backend, reduction="none", decoupled=decoupled, hardness=hardness)
    close(got, torch.tensor(expected, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------- gradients


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "symmetric": info_nce,
    "one way": lambda a, b, t, **options: info_nce(a, b, t, symmetric=False, **options),
    "queue": lambda a, b, t, **options: info_nce(a, b, t, symmetric=False, queue=a.flip(0)[:3] + b[:3], **options),
    "MoCo": lambda a, b, t, **options: info_nce(
        a, b, t, symmetric=False, queue=a.flip(0)[:3] + b[:3], batch_negatives=False, **options
    ),
    "NT-Xent": nt_xent,
}
variants = pytest.mark.parametrize("variant", VARIANTS)
ONE_WAY = ("one way", "queue", "MoCo")  # with one loss per row of a


@both_backends
@variants
@pytest.mark.parametrize(("decoupled", "hardness"), [(False, 0.0), (True, 0.0), (False, 0.5)])
@pytest.mark.parametrize("temperature", [0.1, UNSAFE])
def test_gradients_match_finite_differences(
    backend: str, variant: str, decoupled: bool, hardness: float, temperature: float
) -> None:
    a, b = (z.requires_grad_() for z in views(4, 3, noise=0.02 if temperature == UNSAFE else 1.0))
    relative_t = torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss(a: Tensor, b: Tensor, relative_t: Tensor) -> Tensor:
        options: dict[str, Any] = {"decoupled": decoupled, "hardness": hardness, "reduction": "none"}
        return VARIANTS[variant](a, b, relative_t * temperature, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, (a, b, relative_t), eps=1e-6, atol=1e-6, rtol=1e-5)


@variants
@pytest.mark.parametrize("tile", [1, 3, 8, 64])
@pytest.mark.parametrize("n", [3, 8, 13])  # for tiles of 8: less than one, exactly one, one and a remainder
@pytest.mark.parametrize("temperature", [0.1, UNSAFE])
def test_sizes_that_are_not_multiples_of_the_tile(
    variant: str, tile: int, n: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "tile_size", lambda device: tile)
    a, b = views(n, 3)
    hardness = 0.5  # also for NT-Xent the sums of this module
    count = n if variant in ONE_WAY else 2 * n
    weights = torch.linspace(-1, 2, count, dtype=torch.float64)  # distinct, to detect swapped rows

    def of(backend: str) -> tuple[Tensor, Tensor, Tensor]:
        options: dict[str, Any] = {"hardness": hardness, "backend": backend, "reduction": "none"}
        return loss_and_gradients(lambda *z: VARIANTS[variant](*z, **options), a, b, temperature, weights)

    for mine, theirs in zip(of("tiled"), of("reference"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10 / temperature)


def test_only_what_requires_a_gradient_gets_one() -> None:
    """MoCo: the keys and the queue have none."""
    a, b = views(5, 3)
    a.requires_grad_()
    (da,) = torch.autograd.grad(info_nce(a, b, symmetric=False, queue=b.flip(0)), a)
    b.requires_grad_()
    both = torch.autograd.grad(info_nce(a, b, symmetric=False, queue=b.flip(0).detach()), (a, b))
    close(da, both[0])
    assert both[1].abs().sum() > 0


# ----------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("noise", [30.0, 1.0, 0.1])  # losses from 10 to 1e-5
@pytest.mark.parametrize("temperature", [0.005, 0.05, 0.5])
def test_float32_is_as_accurate_as_eager(noise: float, temperature: float) -> None:
    got = lambda a, b, t: info_nce(a, b, t, backend="tiled", reduction="none")  # noqa: E731
    oracle = lambda a, b, t: info_nce(a, b, t, backend="reference", reduction="none")  # noqa: E731
    batch = views(130, 32, torch.float32, noise=noise)
    assert_as_accurate(got, textbook_towers(None), [batch], temperature, exact_loss=oracle)


@needs_emulation
@pytest.mark.parametrize("precision", ["medium", "highest"])
@pytest.mark.parametrize("temperature", [0.005, 0.05, 10.0])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (63, 7), (65, 130)])  # less and more than a tile; rows wider than one
def test_kernels_are_as_accurate_as_eager_in_the_same_precision(
    n: int, d: int, temperature: float, precision: str
) -> None:
    got = lambda a, b, t: info_nce(a, b, t, backend="emulated", precision=precision, reduction="none")  # noqa: E731
    oracle = lambda a, b, t: info_nce(a, b, t, backend="reference", reduction="none")  # noqa: E731
    planes = 1 if precision == "medium" else 2
    for noise in (30.0, 1.0, 0.1):
        batches = [views(n, d, torch.float32, noise=noise, seed=seed) for seed in range(max(1, 32 // n))]
        yardstick = textbook_towers(planes)
        assert_as_accurate(got, yardstick, batches, temperature, exact_loss=oracle, g_rounding=2.0 ** (-8 * planes))


@needs_emulation
@variants
@pytest.mark.parametrize("hardness", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [0.1, 0.005])  # 0.005: exponentials may overflow
def test_kernels_match_the_reference(variant: str, temperature: float, hardness: float) -> None:
    """With a queue, the matrices are not square; 67 rows are one block of rows and three more."""
    a, b = views(67, 9, torch.float32, noise=0.5)
    count = 67 if variant in ONE_WAY else 134
    weights = torch.linspace(-1e-4, 2e-4, count, dtype=torch.float64)

    def of(backend: str, *z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        options: dict[str, Any] = {"hardness": hardness, "backend": backend, "reduction": "none"}
        return loss_and_gradients(lambda *z: VARIANTS[variant](*z, **options), *z, temperature, weights)

    for mine, theirs in zip(of("emulated", a, b), of("reference", a.double(), b.double()), strict=True):
        # Two bf16 numbers for each factor: similarities have errors of 2^-16.
        bound = 2.0**-16 / temperature
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["tiled", "reference", pytest.param("emulated", marks=needs_emulation)])
def test_half_precision_inputs_and_autocast(backend: str, dtype: torch.dtype) -> None:
    a, b = views(65, 40, dtype, noise=0.3)
    exact = info_nce(a.double(), b.double(), backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        got = info_nce(a.requires_grad_(), b, backend=backend)
    assert got.dtype == torch.float32
    assert abs(got.item() - exact.item()) < 0.02 * exact.item()
    got.backward()
    assert a.grad is not None
    assert a.grad.dtype == dtype


# ----------------------------------------------------------------------------------------------- operators, errors


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck itself
@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["tiled", pytest.param("emulated", marks=needs_emulation)])
@pytest.mark.parametrize("symmetric_matrix", [True, False])
def test_operators_pass_opcheck(implementation: str, symmetric_matrix: bool) -> None:
    a, b = (F.normalize(z, dim=1).requires_grad_() for z in views(5, 4, torch.float32))
    t = torch.tensor(0.2, requires_grad=True)
    other, columns = (None, False) if symmetric_matrix else (b, True)
    how = (implementation, "highest", 0.2)
    sizes = ("", [5], 0, 0)
    torch.library.opcheck(log_sums_forward, (a, other, t, *sizes, columns, not symmetric_matrix, *how))
    with torch.no_grad():
        outputs = log_sums_forward(a, other, t, *sizes, columns, not symmetric_matrix, *how)
    g, h = torch.ones_like(outputs[0]), torch.ones_like(outputs[1])
    inputs = [None if x is None else x.detach() for x in (a, other)]
    torch.library.opcheck(log_sums_backward, (g, h, *inputs, *outputs, t.detach(), *sizes, not symmetric_matrix, *how))


@both_backends
@variants
@pytest.mark.slow
def test_compiles_into_one_graph(backend: str, variant: str) -> None:
    torch.compiler.reset()
    layer = nn.Linear(4, 4, dtype=torch.float64)
    t = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def step(a: Tensor, b: Tensor) -> Tensor:
        return VARIANTS[variant](layer(a), layer(b), t, backend=backend, hardness=0.5)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (6, 9):  # the second size makes the graph dynamic
        results = []
        for run in (step, compiled):
            layer.zero_grad()
            t.grad = None
            loss = run(*views(n, 4))
            loss.backward()
            assert t.grad is not None
            results.append([loss.detach(), layer.weight.grad, t.grad])
        for plain, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["tiled", pytest.param("emulated", marks=needs_emulation)])
def test_second_derivatives_and_transforms_raise(backend: str) -> None:
    a, b = (z.float().requires_grad_() for z in views(4, 3))
    (da,) = torch.autograd.grad(info_nce(a, b, backend=backend), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivative.*use backend="reference"'):
        da.sum().backward()
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.grad(lambda a: info_nce(a, b.detach(), backend=backend))(a.detach())
    many = torch.stack([a.detach(), b.detach()])
    got = torch.func.vmap(lambda a: info_nce(a, b.detach(), backend=backend))(many)
    close(got, torch.stack([info_nce(each, b.detach(), backend=backend) for each in many]), 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": torch.ones(3)}, r"a: got shape \(3,\)"),
        ({"b": torch.ones(4, 3)}, r"a and b: got \(2, 3\).*\(4, 3\).*expected the same shape"),
        ({"b": torch.ones(2, 3, dtype=torch.float64)}, "expected the same shape, dtype and device"),
        ({"queue": torch.ones(5, 4), "symmetric": False}, "a and queue: .*expected the same number of columns"),
        ({"queue": torch.ones(5, 3)}, "queue: got one with symmetric=True"),
        ({"batch_negatives": False, "symmetric": False}, "batch_negatives: got False without a queue"),
        ({"hardness": -1.0}, "hardness: got -1.0"),
        ({"hardness": math.nan}, "hardness: got nan"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"backend": "magic"}, "backend: got 'magic'"),
        ({"reduction": "sum"}, "reduction: got 'sum'"),
        ({"a": torch.ones(1, 3), "b": torch.ones(1, 3)}, "no negatives"),
    ],
)
def test_invalid_arguments_raise(options: dict[str, Any], message: str) -> None:
    arguments = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)} | options
    with pytest.raises(ValueError, match=message):
        info_nce(**arguments)


def test_a_queue_alone_provides_negatives() -> None:
    a, b = views(1, 3)
    queue = torch.eye(3, dtype=torch.float64)
    got = info_nce(a, b, 0.2, symmetric=False, queue=queue, reduction="none")
    close(got, torch.tensor(in_scalars(a, b, queue, 0.2, False, 0.0), dtype=torch.float64))


def test_module_learns_its_temperature() -> None:
    a, b = views(6, 3)
    criterion = InfoNCELoss(nn.Parameter(torch.tensor(0.3, dtype=torch.float64)), symmetric=False, decoupled=True)
    loss = criterion(a, b, b.flip(0))
    close(loss, info_nce(a, b, 0.3, symmetric=False, decoupled=True, queue=b.flip(0)))
    loss.backward()
    (temperature,) = criterion.parameters()
    assert temperature.grad is not None
    assert "temperature=learned, symmetric=False" in repr(criterion)


@pytest.mark.slow
def test_memory_is_linear_in_the_batch() -> None:
    """A matrix of 4096 x 4096 would take 64 MiB; the inputs and their gradients take 2 MiB each."""
    a, b = (z.requires_grad_() for z in views(4096, 128, torch.float32))
    for options in ({}, {"hardness": 0.5}, {"symmetric": False, "queue": b.detach()}):
        peak = peak_mib(lambda options=options: info_nce(a, b, backend="tiled", **options).backward())
        assert 4 < peak < 40, (options, peak)
