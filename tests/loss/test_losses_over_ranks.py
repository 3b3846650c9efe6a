"""The losses over gloo ranks: all results equal those of one process with all ranks' images.

Every rank has its own data, and usually a different number of images: identical data would hide rows that are confused
between ranks. Starting ranks takes seconds, so all cases of one world size run in one start.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsimclr._extension import why_unavailable
from fastsimclr.distributed import group_name
from fastsimclr.loss import info_nce, nt_xent, sup_con, tiles
from fastsimclr.loss.fused import fused_backward, fused_forward
from fastsimclr.loss.tiled import tiled_backward, tiled_forward

pytestmark = pytest.mark.slow

D_IN, D = 5, 4


@dataclass(frozen=True)
class Layout:
    """The process groups that compute a loss, and the number of images of each rank."""

    name: str
    sizes: tuple[int, ...]  # images per rank
    groups: tuple[tuple[int, ...], ...] = ()  # () means group="world"
    identical: bool = False  # all ranks have the same images

    def members(self, rank: int) -> tuple[int, ...]:
        return next((group for group in self.groups if rank in group), tuple(range(len(self.sizes))))

    def images(self, rank: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(0 if self.identical else rank)
        x = torch.randn(self.sizes[rank], D_IN, generator=random, dtype=torch.float64)
        x1, x2 = (x + 0.3 * torch.randn(x.shape, generator=random, dtype=torch.float64) for _ in range(2))
        return x1, x2

    def labels(self, rank: int) -> Tensor:
        """Return the class of each image; every class has images on several ranks."""
        return (7 * torch.arange(self.sizes[rank]) + rank) % 3

    def weights(self, rank: int) -> Tensor:
        """Return the weights of the rank's rows in a weighted sum of the losses of reduction="none"."""
        random = torch.Generator().manual_seed(100 + rank)
        return torch.rand(2 * self.sizes[rank], generator=random, dtype=torch.float64) - 0.3


LAYOUTS = {
    2: (
        Layout("2 ranks", (4, 4)),
        Layout("2 uneven ranks", (5, 3)),
        Layout("2 ranks with the same images", (4, 4), identical=True),  # another rank's copy of an image is a negative
        Layout("2 ranks, each a group", (4, 3), groups=((0,), (1,))),
    ),
    4: (
        Layout("4 ranks", (3, 3, 3, 3)),
        Layout("4 uneven ranks", (1, 2, 4, 3)),  # one rank with one image: all its negatives are on other ranks
        Layout("2 groups of 2", (2, 3, 4, 1), groups=((0, 2), (1, 3))),  # the rank in the group is not the global rank
    ),
}


QUEUE = torch.randn(3, D, generator=torch.Generator().manual_seed(200), dtype=torch.float64)


def both_ways(z1: Tensor, z2: Tensor, t: Tensor, *, reduction: str, **options: Any) -> Tensor:
    """The symmetric loss from one loss of each direction, each with the queue."""
    queue, options = QUEUE.to(z1.dtype), options | {"reduction": reduction, "symmetric": False}
    losses = [info_nce(a, b, t, queue=queue, **options) for a, b in ((z1, z2), (z2, z1))]
    return torch.stack(losses).mean() if reduction == "mean" else torch.cat(losses)


# From the projections, the classes of the images and the temperature to the losses of z1's rows, then z2's.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "NT-Xent": lambda z1, z2, labels, t, **options: nt_xent(z1, z2, t, **options),
    "hard negatives": lambda z1, z2, labels, t, **options: nt_xent(z1, z2, t, hardness=0.5, **options),
    "InfoNCE": lambda z1, z2, labels, t, **options: info_nce(z1, z2, t, **options),
    "InfoNCE with a queue": lambda z1, z2, labels, t, **options: both_ways(z1, z2, t, **options),
    "SupCon": lambda z1, z2, labels, t, **options: sup_con(torch.cat([z1, z2]), labels.repeat(2), t, **options),
}


@dataclass(frozen=True)
class Case:
    backend: str
    reduction: str
    decoupled: bool = False
    temperature: float = 0.2
    tile: int | None = None  # rows of a tile; None: the default size
    loss: str = "NT-Xent"

    @property
    def options(self) -> dict[str, Any]:
        decoupled = {} if self.loss == "SupCon" else {"decoupled": self.decoupled}
        return {"backend": self.backend, "reduction": self.reduction, **decoupled}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the projections; the model is float64."""
        return torch.float32 if self.backend == "emulated" else torch.float64

    @property
    def tolerance(self) -> tuple[float, float]:
        """Relative tolerance, and absolute tolerance at a temperature of 1 and results of 1."""
        if self.backend != "emulated":
            return 1e-10, 1e-13
        # The kernels' similarities have errors of 2^-16. Those of a row and its positive cancel in one softmax, but not
        # between the two of weighted negatives, nor between SupCon's and the sum of a row's positives.
        return 1e-3, 2.0**-16 if self.loss in ("hard negatives", "SupCon") else 2e-6


CASES = [
    Case(*each)
    # 1/800: exp overflows float64, which needs other formulas
    for each in itertools.product(("tiled", "reference"), ("mean", "none"), (False, True), (0.2, 1 / 800))
]
CASES += [Case("tiled", "none", False, t, tile=3) for t in (0.2, 1 / 800)]  # tiles cross every boundary between ranks
if not why_unavailable(torch.device("cpu")):  # the fused kernels: at 0.005 their exponentials may overflow
    CASES += [Case("emulated", *each) for each in itertools.product(("mean", "none"), (False, True), (0.2, 0.005))]
OTHERS = [name for name in LOSSES if name != "NT-Xent"]
for name in OTHERS:
    CASES += [Case("tiled", "mean", loss=name), Case("reference", "none", loss=name)]
    CASES += [Case("tiled", "none", temperature=1 / 800, loss=name), Case("tiled", "none", tile=3, loss=name)]
    if not why_unavailable(torch.device("cpu")):
        CASES += [Case("emulated", "none", loss=name)]


class Model(nn.Module):
    """The graph of a training step: shared weights, a learned temperature, the loss."""

    def __init__(self, case: Case, group: Any) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layer = nn.Linear(D_IN, D, dtype=torch.float64)
        self.temperature = nn.Parameter(torch.tensor(case.temperature, dtype=torch.float64))
        self.case, self.group = case, group
        self.z: list[Tensor] = []

    def forward(self, x1: Tensor, x2: Tensor, labels: Tensor) -> Tensor:
        self.z = [self.layer(x).to(self.case.dtype) for x in (x1, x2)]
        for z in self.z:
            z.retain_grad()
        loss = LOSSES[self.case.loss]
        return loss(*self.z, labels, self.temperature, group=self.group, **self.case.options)


@dataclass(frozen=True)
class Result:
    """The result of one case on one rank."""

    losses: Tensor  # the return value of the loss
    dz1: Tensor
    dz2: Tensor
    gradients: dict[str, Tensor]  # of the parameters, averaged over the ranks by DDP


@contextmanager
def tile_size(rows: int | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if rows is not None:
            patch.setattr(tiles, "tile_size", lambda device: rows)
        yield


def run_all_cases(rank: int, layouts: tuple[Layout, ...]) -> dict[tuple[str, Case], Result]:
    results = {}
    for layout in layouts:
        groups = [dist.new_group(list(members)) for members in layout.groups]  # all ranks must create all groups
        mine = next((g for g, members in zip(groups, layout.groups, strict=True) if rank in members), None)
        for case in CASES:
            model = Model(case, mine or "world")
            parallel = DistributedDataParallel(model, process_group=mine)
            with tile_size(case.tile):
                losses = parallel(*layout.images(rank), layout.labels(rank))
                (losses if case.reduction == "mean" else losses @ layout.weights(rank).to(losses.dtype)).backward()
            z1, z2 = model.z
            assert z1.grad is not None
            assert z2.grad is not None
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            results[layout.name, case] = Result(losses.detach(), z1.grad, z2.grad, gradients)
    return results


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[tuple[str, Case], Result]]]:
    """The results of every rank, by world size."""
    return {world_size: run_ranks(world_size, run_all_cases, layouts) for world_size, layouts in LAYOUTS.items()}


def one_process(layout: Layout, case: Case, members: tuple[int, ...]) -> Result:
    """Run the same step in one process on the concatenated batch of `members` with the dense loss. The objective is the
    mean over the ranks."""
    model = Model(Case("reference", "none", case.decoupled, case.temperature, loss=case.loss), None)
    x1, x2 = (torch.cat(x) for x in zip(*(layout.images(rank) for rank in members), strict=True))
    losses = model(x1, x2, torch.cat([layout.labels(rank) for rank in members]))
    if case.reduction == "mean":
        losses.mean().backward()
    else:
        w1, w2 = (torch.cat(w) for w in zip(*(layout.weights(rank).chunk(2) for rank in members), strict=True))
        (losses @ torch.cat([w1, w2]) / len(members)).backward()
    z1, z2 = model.z
    assert z1.grad is not None
    assert z2.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Result(losses.detach(), z1.grad, z2.grad, gradients)


by_layout = pytest.mark.parametrize(
    "layout", [each for some in LAYOUTS.values() for each in some], ids=lambda x: x.name
)


def compare(got: Tensor, expected: Tensor, case: Case, scale: float = 1.0) -> None:
    """Assert that `got` is `expected`. scale: size of the terms of the result, if it is above 1 and they may cancel."""
    scale = max(scale, expected.abs().max().item())
    relative, absolute = case.tolerance
    options = {"rtol": relative, "atol": absolute * scale / case.temperature}
    torch.testing.assert_close(got.double(), expected, **options, msg=lambda text: f"{case}: {text}")


@by_layout
def test_losses_match_one_process(layout: Layout, results: dict[int, list[dict[tuple[str, Case], Result]]]) -> None:
    """Row by row and on average. Detects wrong masks on ranks above 0 and images confused between ranks."""
    ranks = results[len(layout.sizes)]
    for case, rank in itertools.product(CASES, range(len(ranks))):
        members = layout.members(rank)
        expected = one_process(layout, case, members).losses
        if case.reduction == "mean":
            mean = torch.stack([ranks[r][layout.name, case].losses for r in members]).mean()
            compare(mean, expected.mean(), case)
        else:
            start = sum(layout.sizes[r] for r in members if r < rank)
            rows = torch.cat([view[start : start + layout.sizes[rank]] for view in expected.chunk(2)])
            compare(ranks[rank][layout.name, case].losses, rows, case)


@by_layout
def test_gradients_match_one_process(layout: Layout, results: dict[int, list[dict[tuple[str, Case], Result]]]) -> None:
    """DDP's mean gradients equal those of one process; each rank's dz is world_size times its rows there."""
    ranks = results[len(layout.sizes)]
    for case, rank in itertools.product(CASES, range(len(ranks))):
        members = layout.members(rank)
        expected = one_process(layout, case, members)
        got = ranks[rank][layout.name, case]
        assert got.gradients.keys() == expected.gradients.keys() == {"layer.weight", "layer.bias", "temperature"}
        # The temperature's gradient is a weighted sum, over rows, of cosines / temperature^2.
        weights = torch.ones(1) if case.reduction == "mean" else torch.cat([layout.weights(r) for r in members])
        for name, gradient in got.gradients.items():
            scale = weights.abs().sum().item() / case.temperature if name == "temperature" else 1.0
            compare(gradient, expected.gradients[name], case, scale)
        start = sum(layout.sizes[r] for r in members if r < rank)
        for mine, theirs in ((got.dz1, expected.dz1), (got.dz2, expected.dz2)):
            compare(mine, len(members) * theirs[start : start + layout.sizes[rank]], case)


# ----------------------------------------------------------------------------------------------- collectives


@contextmanager
def record_collectives() -> Iterator[list[str]]:
    """Record the names of the collectives of torch.distributed that are called."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in dir(dist):
            if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "send", "isend", "batch_")):
                function = getattr(dist, name)
                patch.setattr(
                    dist, name, lambda *args, _f=function, _n=name, **kwargs: (calls.append(_n), _f(*args, **kwargs))[1]
                )
        yield calls


# The backends with their own collectives: dtype, forward operator and backward operator.
OPERATORS: dict[str, tuple[torch.dtype, Any, Any]] = {"tiled": (torch.float64, tiled_forward, tiled_backward)}
if not why_unavailable(torch.device("cpu")):
    OPERATORS["emulated"] = (torch.float32, fused_forward, fused_backward)


def check_operators(rank: int, backend: str) -> dict[str, Any]:
    dtype, forward_op, backward_op = OPERATORS[backend]
    z1, z2 = (x.to(dtype).requires_grad_() for x in Layout("", (5, 3)).images(rank))
    result: dict[str, Any] = {}
    for reduction in ("mean", "none"):
        with record_collectives() as forward:
            loss = nt_xent(z1, z2, group="world", backend=backend, reduction=reduction)
        with record_collectives() as backward:
            loss.sum().backward()
        result[reduction] = (forward, backward)

    # A NaN on one rank must make the loss non-finite on all ranks.
    with_nan = z1.detach().clone()
    if rank == 1:
        with_nan[0, 0] = torch.nan
    result["finite"] = nt_xent(with_nan, z2.detach(), group="world", backend=backend).isfinite().item()

    name = group_name(dist.group.WORLD)
    t = torch.tensor(0.2, dtype=dtype, requires_grad=True)
    inputs = [z.detach().requires_grad_() for z in (z1, z2)]
    arguments = (*inputs, t, name, True, False, "highest", 0.2)
    torch.library.opcheck(forward_op, arguments)
    loss, *saved = (x.detach() for x in forward_op(*arguments))
    if backend == "tiled":
        rest: tuple[Any, ...] = (*saved, t.detach(), name, "highest", 0.2)
    else:
        rest = (*(z.detach() for z in inputs), *saved, t.detach(), name, 0.2)
    torch.library.opcheck(backward_op, (torch.ones_like(loss), *rest))

    def step(x1: Tensor, x2: Tensor) -> Tensor:
        return nt_xent(x1.sin(), x2.sin(), group="world", backend=backend)

    gradients = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        gradients.append(torch.autograd.grad(run(z1, z2), (z1, z2)))
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-7)
    return result


@pytest.mark.parametrize("backend", OPERATORS)
def test_collectives_and_operators_over_ranks(backend: str) -> None:
    for result in run_ranks(2, check_operators, backend):
        forward, backward = result["mean"]
        assert len(forward) == 3, forward  # the ranks' numbers of rows, the rows, and their sums
        assert backward == [], "the backward of a mean communicates nothing"
        _, backward = result["none"]
        assert len(backward) == 1, backward  # the weights of the rows
        assert not result["finite"]


def test_nan_on_one_rank_reaches_the_reference_loss_on_all() -> None:
    assert run_ranks(2, reference_is_finite) == [False, False]


def reference_is_finite(rank: int) -> bool:
    z1, z2 = Layout("", (5, 3)).images(rank)
    if rank == 1:
        z1[0, 0] = torch.nan
    return bool(nt_xent(z1, z2, group="world", backend="reference").isfinite())


def gathered_on_rank(rank: int, rows: list[Tensor]) -> list[tuple[Tensor, Tensor, set[torch.dtype]]]:
    """Return loss, gradient and the dtype of the gathered rows, on CPUs with and without products of bf16."""
    results, exchange = [], tiles.all_gather_rows
    for has_bf16 in (True, False):
        gathered: set[torch.dtype] = set()

        def spy(part: Tensor, *arguments: Any, seen: set[torch.dtype] = gathered) -> Tensor:
            seen.add(part.dtype)
            return exchange(part, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "all_gather_rows", spy)
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
                patch.setattr(torch.cpu, name, lambda result=has_bf16: result)
            z = rows[rank].clone().requires_grad_()
            options: Any = {"backend": "tiled", "precision": "medium", "group": "world"}
            loss = nt_xent(*z.chunk(2), **options) + info_nce(*z.chunk(2), **options)
            loss.backward()
        assert z.grad is not None
        results.append((loss.detach(), z.grad, gathered))
    return results


def test_rows_are_gathered_in_the_precision_of_their_products() -> None:
    rows = list(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)))
    z = torch.cat([part[:4] for part in rows] + [part[4:] for part in rows]).requires_grad_()
    loss = nt_xent(*z.chunk(2), backend="tiled") + info_nce(*z.chunk(2), backend="tiled")
    loss.backward()
    assert z.grad is not None
    of_ranks = run_ranks(2, gathered_on_rank, rows)
    for case, expected in enumerate((torch.bfloat16, torch.float32)):
        losses, gradients, dtypes = zip(*(results[case] for results in of_ranks), strict=True)
        assert set.union(*dtypes) == {expected}
        torch.testing.assert_close(sum(losses) / 2, loss.detach(), rtol=2e-2, atol=0)
        for rank, gradient in enumerate(gradients):
            own = torch.cat([part[4 * rank : 4 * rank + 4] for part in z.grad.chunk(2)])
            torch.testing.assert_close(gradient / 2, own, rtol=0, atol=2e-2 * float(own.abs().max()))  # DDP averages
