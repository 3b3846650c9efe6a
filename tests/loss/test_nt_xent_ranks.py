"""The NT-Xent loss over gloo ranks: every figure that of one process which has all ranks' images.

Every rank has its own data, and mostly another number of images: what is alike on all ranks would hide a row that is
taken for another rank's. A start of ranks costs seconds: one start per number of ranks runs all cases.
"""

import itertools
from collections.abc import Iterator
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
from fastsimclr.loss import nt_xent, tiled
from fastsimclr.loss.fused import fused_backward, fused_forward
from fastsimclr.loss.tiled import tiled_backward, tiled_forward

D_IN, D = 5, 4


@dataclass(frozen=True)
class Layout:
    """Which ranks share a loss, and how many images each rank has."""

    name: str
    sizes: tuple[int, ...]  # images of each rank
    groups: tuple[tuple[int, ...], ...] = ()  # () is group="world"
    alike: bool = False  # all ranks have the same images

    def members(self, rank: int) -> tuple[int, ...]:
        return next((group for group in self.groups if rank in group), tuple(range(len(self.sizes))))

    def images(self, rank: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(0 if self.alike else rank)
        x = torch.randn(self.sizes[rank], D_IN, generator=random, dtype=torch.float64)
        x1, x2 = (x + 0.3 * torch.randn(x.shape, generator=random, dtype=torch.float64) for _ in range(2))
        return x1, x2

    def weights(self, rank: int) -> Tensor:
        """Of each of the rank's rows, in a weighted sum of the losses that reduction="none" returns."""
        random = torch.Generator().manual_seed(100 + rank)
        return torch.rand(2 * self.sizes[rank], generator=random, dtype=torch.float64) - 0.3


LAYOUTS = {
    2: (
        Layout("2 ranks", (4, 4)),
        Layout("2 uneven ranks", (5, 3)),
        Layout("2 ranks with the same images", (4, 4), alike=True),  # another rank's copy of an image is a negative
        Layout("2 ranks, each a group", (4, 3), groups=((0,), (1,))),
    ),
    4: (
        Layout("4 ranks", (3, 3, 3, 3)),
        Layout("4 uneven ranks", (1, 2, 4, 3)),  # one rank with one image: all its negatives are elsewhere
        Layout("2 groups of 2", (2, 3, 4, 1), groups=((0, 2), (1, 3))),  # a rank's place in its group is not its rank
    ),
}


@dataclass(frozen=True)
class Case:
    backend: str
    reduction: str
    decoupled: bool = False
    temperature: float = 0.2
    tile: int | None = None  # rows of a tile; None: the real size

    @property
    def options(self) -> dict[str, Any]:
        return {"backend": self.backend, "reduction": self.reduction, "decoupled": self.decoupled}

    @property
    def dtype(self) -> torch.dtype:
        """What the loss gets; the model is of float64."""
        return torch.float32 if self.backend == "emulated" else torch.float64

    @property
    def tolerance(self) -> tuple[float, float]:
        """Relative, and absolute for a temperature of 1 and results of 1."""
        return (1e-3, 2e-6) if self.backend == "emulated" else (1e-10, 1e-13)


CASES = [
    Case(*each)
    # 1/800: exp overflows float64, so other formulas
    for each in itertools.product(("tiled", "reference"), ("mean", "none"), (False, True), (0.2, 1 / 800))
]
CASES += [Case("tiled", "none", False, t, tile=3) for t in (0.2, 1 / 800)]  # tiles across every boundary between ranks
if not why_unavailable(torch.device("cpu")):  # the fused kernels: 0.005 is below their bound of overflow
    CASES += [Case("emulated", *each) for each in itertools.product(("mean", "none"), (False, True), (0.2, 0.005))]


class Model(nn.Module):
    """What a training step differentiates: shared weights, a learned temperature, the loss."""

    def __init__(self, case: Case, group: Any) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layer = nn.Linear(D_IN, D, dtype=torch.float64)
        self.temperature = nn.Parameter(torch.tensor(case.temperature, dtype=torch.float64))
        self.case, self.group = case, group
        self.z: list[Tensor] = []

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        self.z = [self.layer(x).to(self.case.dtype) for x in (x1, x2)]
        for z in self.z:
            z.retain_grad()
        return nt_xent(*self.z, self.temperature, group=self.group, **self.case.options)


@dataclass(frozen=True)
class Found:
    """What one rank sees of one case."""

    losses: Tensor  # what nt_xent returned
    dz1: Tensor
    dz2: Tensor
    gradients: dict[str, Tensor]  # of the parameters, after DDP's mean over ranks


@contextmanager
def tile_size(rows: int | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if rows is not None:
            patch.setattr(tiled, "_tile_size", lambda device: rows)
        yield


def all_cases(rank: int, layouts: tuple[Layout, ...]) -> dict[tuple[str, Case], Found]:
    found = {}
    for layout in layouts:
        groups = [dist.new_group(list(members)) for members in layout.groups]  # all ranks make all groups
        mine = next((g for g, members in zip(groups, layout.groups, strict=True) if rank in members), None)
        for case in CASES:
            model = Model(case, mine or "world")
            parallel = DistributedDataParallel(model, process_group=mine)
            with tile_size(case.tile):
                losses = parallel(*layout.images(rank))
                (losses if case.reduction == "mean" else losses @ layout.weights(rank).to(losses.dtype)).backward()
            z1, z2 = model.z
            assert z1.grad is not None
            assert z2.grad is not None
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found[layout.name, case] = Found(losses.detach(), z1.grad, z2.grad, gradients)
    return found


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[tuple[str, Case], Found]]]:
    """By number of ranks, for each rank."""
    return {ranks: run_ranks(ranks, all_cases, layouts) for ranks, layouts in LAYOUTS.items()}


def one_process(layout: Layout, case: Case, members: tuple[int, ...]) -> Found:
    """The same step on the concatenated batch of `members`, by the dense loss; its objective is the ranks' mean."""
    model = Model(Case("reference", "none", case.decoupled, case.temperature), None)
    x1, x2 = (torch.cat(x) for x in zip(*(layout.images(rank) for rank in members), strict=True))
    losses = model(x1, x2)
    if case.reduction == "mean":
        losses.mean().backward()
    else:
        w1, w2 = (torch.cat(w) for w in zip(*(layout.weights(rank).chunk(2) for rank in members), strict=True))
        (losses @ torch.cat([w1, w2]) / len(members)).backward()
    z1, z2 = model.z
    assert z1.grad is not None
    assert z2.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Found(losses.detach(), z1.grad, z2.grad, gradients)


by_layout = pytest.mark.parametrize(
    "layout", [each for some in LAYOUTS.values() for each in some], ids=lambda x: x.name
)


def compare(got: Tensor, expected: Tensor, case: Case, scale: float = 1.0) -> None:
    """scale: the size of the terms that add up to the result, if it is above 1 and they may cancel."""
    scale = max(scale, expected.abs().max().item())
    relative, absolute = case.tolerance
    torch.testing.assert_close(got.double(), expected, rtol=relative, atol=absolute * scale / case.temperature)


@by_layout
def test_trap_masks_on_ranks_above_0_and_sample_identity_by_rank(
    layout: Layout, found: dict[int, list[dict[tuple[str, Case], Found]]]
) -> None:
    """Each rank's losses, row by row, and their mean are those of the one process."""
    ranks = found[len(layout.sizes)]
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
def test_trap_gradient_w_times_too_small(layout: Layout, found: dict[int, list[dict[tuple[str, Case], Found]]]) -> None:
    """DDP's mean gradients are the one process's; each rank's dz is W times its rows of the one process's."""
    ranks = found[len(layout.sizes)]
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
def counted() -> Iterator[list[str]]:
    """The collectives of torch.distributed that are called inside, by name."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in dir(dist):
            if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "send", "isend", "batch_")):
                function = getattr(dist, name)
                patch.setattr(
                    dist, name, lambda *args, _f=function, _n=name, **kwargs: (calls.append(_n), _f(*args, **kwargs))[1]
                )
        yield calls


# The backends that gather by themselves: the dtype that they take, and their two operators.
OPERATORS: dict[str, tuple[torch.dtype, Any, Any]] = {"tiled": (torch.float64, tiled_forward, tiled_backward)}
if not why_unavailable(torch.device("cpu")):
    OPERATORS["emulated"] = (torch.float32, fused_forward, fused_backward)


def collectives_of(rank: int, backend: str) -> dict[str, Any]:
    dtype, forward_op, backward_op = OPERATORS[backend]
    z1, z2 = (x.to(dtype).requires_grad_() for x in Layout("", (5, 3)).images(rank))
    result: dict[str, Any] = {}
    for reduction in ("mean", "none"):
        with counted() as forward:
            loss = nt_xent(z1, z2, group="world", backend=backend, reduction=reduction)
        with counted() as backward:
            loss.sum().backward()
        result[reduction] = (forward, backward)

    # A NaN on one rank must not pass unseen on the others.
    broken = z1.detach().clone()
    if rank == 1:
        broken[0, 0] = torch.nan
    result["finite"] = nt_xent(broken, z2.detach(), group="world", backend=backend).isfinite().item()

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
def test_backward_of_a_mean_communicates_nothing_and_the_operators_work_over_ranks(backend: str) -> None:
    for found in run_ranks(2, collectives_of, backend):
        forward, backward = found["mean"]
        assert len(forward) == 3, forward  # how many rows each rank has, the rows, and their sums
        assert backward == []
        _, backward = found["none"]
        assert len(backward) == 1, backward  # the rows' weights, which only their rank knows
        assert not found["finite"]


def test_a_nan_on_one_rank_is_seen_by_the_reference_on_all() -> None:
    assert run_ranks(2, reference_is_finite) == [False, False]


def reference_is_finite(rank: int) -> bool:
    z1, z2 = Layout("", (5, 3)).images(rank)
    if rank == 1:
        z1[0, 0] = torch.nan
    return bool(nt_xent(z1, z2, group="world", backend="reference").isfinite())
