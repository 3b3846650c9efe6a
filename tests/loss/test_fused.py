"""The fused kernels, on a GPU if available and always emulated (the same sources compiled for the CPU).

Emulation is some thousand times slower than a GPU, so by default it runs every boundary once and not the whole grid:
FASTSIMCLR_WHOLE_GRID=1 python -m pytest tests/loss/test_fused.py runs all of it (a GPU always does).
"""

import itertools
import math
import os
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    assert_as_accurate,
    loss_and_gradients,
    needs_emulation,
    relative_error,
    row_losses,
    textbook,
    textbook_in_bf16,
    views,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsimclr import _extension
from fastsimclr.loss import BackendError, NTXentLoss, choose_backend, fused, nt_xent
from fastsimclr.loss.fused import fused_backward, fused_forward

# With two threads, every operation of the reference would wait for the other thread if another process uses a core.
pytestmark = pytest.mark.usefixtures("one_thread")

WHOLE_GRID = os.environ.get("FASTSIMCLR_WHOLE_GRID") == "1"
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not fused.is_available(), reason="needs a GPU and an extension built for CUDA"),
]
on_each_device = pytest.mark.parametrize(
    ("device", "backend"),
    [pytest.param("cpu", "emulated", marks=needs_emulation), pytest.param("cuda", "fused", marks=gpu)],
    ids=["emulated", "fused"],
)
PLANES = {"medium": 1, "highest": 2}


def to_device(device: str, *z: Tensor) -> list[Tensor]:
    return [x.to(device) for x in z]


# ----------------------------------------------------------------------------------------------- the grid

SIZES = [2, 6, 126, 130, 514, 1026]  # M; 126, 130: a tile of 128 rows minus and plus 2; 514: 5 row blocks, 17 tiles
WIDTHS = [1, 7, 64, 96, 128, 130, 512]  # D; 64, 128: full blocks; 130: beyond one; 512: two (medium), four (highest)
TEMPERATURES = [0.005, 0.05, 0.5, 10.0]  # 0.005: exponentials may overflow
NOISES = [30.0, 1.0, 0.1]  # distance between the views: together with the temperatures, losses from 10 to 1e-5
WHOLE = [(m, d, TEMPERATURES) for m, d in itertools.product(SIZES, WIDTHS)]
PART = [(m, d, [0.005, 0.05, 10.0]) for m, d in itertools.product([2, 126, 130], WIDTHS)]
PART += [(6, 7, TEMPERATURES), (514, 128, [0.05, 0.005]), (1026, 64, [0.5])]
FAST = [(2, 1), (6, 7), (126, 64), (130, 64), (130, 128)]  # the others are slow in emulation
GRID = [
    pytest.param(
        "cpu", "emulated", *case, marks=needs_emulation if case[:2] in FAST else [needs_emulation, pytest.mark.slow]
    )
    for case in (WHOLE if WHOLE_GRID else PART)
]
GRID += [pytest.param("cuda", "fused", *case, marks=gpu) for case in WHOLE]


@pytest.mark.parametrize(("device", "backend", "m", "d", "temperatures"), GRID)
@pytest.mark.parametrize("precision", PLANES)
def test_losses_and_gradients_are_as_accurate_as_eager_in_the_same_precision(
    device: str, backend: str, m: int, d: int, temperatures: list[float], precision: str
) -> None:
    for temperature, noise in itertools.product(temperatures, NOISES):
        seeds = range(max(1, 64 // m))  # at least 64 rows in total
        assert_as_accurate(
            row_losses(backend, precision=precision),
            textbook_in_bf16(PLANES[precision]),
            [to_device(device, *views(m // 2, d, torch.float32, noise=noise, seed=seed)) for seed in seeds],
            temperature,
            g_rounding=2.0 ** (-8 * PLANES[precision]),
        )


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["auto", "highest"])
def test_half_precision_inputs_are_as_accurate_as_eager(
    device: str, backend: str, dtype: torch.dtype, precision: str
) -> None:
    """precision="auto" is medium here. Eager in fp16 and bf16 rounds everything; the bf16-products yardstick is
    stricter."""
    batch = to_device(device, *views(65, 40, dtype, noise=0.3))
    planes = 1 if precision == "auto" else 2
    for eager in (textbook_in_bf16(planes), textbook):
        assert_as_accurate(row_losses(backend, precision=precision), eager, [batch], 0.1)


@on_each_device
@pytest.mark.parametrize("precision", PLANES)
@pytest.mark.parametrize(
    ("noise", "temperature", "loss", "bounds"),
    [  # bounds of the gradient's relative error: twice the error of one and two bf16 numbers in float64 simulations
        (30.0, 0.02, 10.0, {"medium": 2e-2, "highest": 4e-5}),
        (0.3, 0.1, 0.1, {"medium": 1e-2, "highest": 2e-5}),
        (0.15, 0.07, 1e-3, {"medium": 1.6e-2, "highest": 2e-5}),
        (0.1, 0.05, 1e-5, {"medium": 1.6e-2, "highest": 2e-5}),
    ],
    ids=["loss 10", "loss 0.1", "loss 1e-3", "loss 1e-5"],
)
def test_gradient_is_accurate_for_small_losses(
    device: str, backend: str, precision: str, noise: float, temperature: float, loss: float, bounds: dict[str, float]
) -> None:
    z1, z2 = to_device(device, *views(128, 128, torch.float32, noise=noise))
    exact = loss_and_gradients(row_losses("reference"), z1.double(), z2.double(), temperature)
    assert loss / 8 < exact[0].mean().item() < loss * 8, "the case does not have the intended loss"
    _, dz, _ = loss_and_gradients(row_losses(backend, precision=precision), z1, z2, temperature)
    assert relative_error(dz, exact[1]) < bounds[precision]


@on_each_device
@pytest.mark.parametrize(
    ("m", "d"),
    [(4096, 64), (66, 2048)],  # sums over many columns (backward) and over a large width (similarities)
)
@pytest.mark.slow
def test_highest_precision_error_below_1e_5_if_features_share_a_mean(device: str, backend: str, m: int, d: int) -> None:
    """All products are then positive, and sums truncated by tensor cores drift in one direction: accumulating only in
    tensor cores gives errors of 1.5e-5 of the gradient at M = 4096 and of 2e-5 of the losses at D = 2048."""
    z = [3 + F.normalize(x) * d**0.5 for x in views(m // 2, d, noise=0.5)]
    exact = loss_and_gradients(row_losses("reference"), *z, 0.1)
    z1, z2 = to_device(device, *(x.float() for x in z))
    got = loss_and_gradients(row_losses(backend, precision="highest"), z1, z2, 0.1)
    for name, a, b in zip(("losses", "dz", "dtemperature"), got, exact, strict=True):
        assert relative_error(a.cpu(), b) < 1e-5, name


@on_each_device
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [0.2, 0.005])
def test_mean_weighted_rows_and_decoupled_match_the_reference(
    device: str, backend: str, decoupled: bool, temperature: float
) -> None:
    z1, z2 = to_device(device, *views(67, 9, torch.float32, noise=0.5))
    weights = torch.linspace(-1e-4, 2e-4, 134, dtype=torch.float64, device=device)  # distinct, small, and one 0
    weights[5] = 0
    options = {"decoupled": decoupled, "precision": "highest"}
    for w in (weights, None):
        got = loss_and_gradients(row_losses(backend, **options), z1, z2, temperature, w)
        exact = loss_and_gradients(
            row_losses("reference", decoupled=decoupled), z1.double(), z2.double(), temperature, w
        )
        for mine, theirs in zip(got, exact, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4 * theirs.abs().max().item())

    def mean(backend: str, *z: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in z]
        loss = nt_xent(*leaves, temperature, backend=backend, decoupled=decoupled)
        (3 * loss).backward()
        return [loss.detach().double(), *(x.grad.double() for x in leaves if x.grad is not None)]

    for mine, theirs in zip(mean(backend, z1, z2), mean("reference", z1.double(), z2.double()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4 * theirs.abs().max().item())


@on_each_device
@pytest.mark.slow
def test_forward_units_of_several_row_blocks(device: str, backend: str) -> None:
    """With more than 32 blocks of 128 rows, a unit has two, and adds column sums to its own rows."""
    z1, z2 = to_device(device, *views(2113, 16, torch.float32))
    t = torch.tensor(0.1, device=device)
    got, exact = (
        nt_xent(z1, z2, t, backend=name, precision="highest", reduction="none") for name in (backend, "tiled")
    )
    torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-5)


# ----------------------------------------------------------------------------------------------- splitting of the work

# Rows and columns on one rank, with one and with several ranks.
SPLIT_SIZES = [(2, 2), (130, 130), (1026, 1026), (8192, 8192), (8192, 65536), (32768, 32768), (131072, 131072)]
MULTIPROCESSORS = [1, 4, 132, 264]  # 132: H100; the emulation runs one thread block on each


def parts(steps: int, splits: int) -> list[int]:
    """Return the steps of each part; the kernels round the length of a part up."""
    length = -(-steps // splits)
    return [max(0, min(length, steps - start * length)) for start in range(splits)]


@needs_emulation
@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize(("rows", "columns"), SPLIT_SIZES)
@pytest.mark.parametrize(("planes", "width"), [(1, 128), (1, 512), (2, 128)])
def test_backward_splits_save_at_least_a_tenth_and_none_is_empty(
    rows: int, columns: int, planes: int, width: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSIMCLR_EMULATION_MULTIPROCESSORS", str(multiprocessors))
    shape = {"planes": planes, "width": width, "device": 0}
    splits = _extension.emulated.nt_xent_backward_splits(rows=rows, columns=columns, **shape)
    tall = planes == 1 and width <= 128  # tile shapes, as in csrc/tile.cuh
    blocks, tiles = -(-rows // (128 if tall else 64)) * (width // 256 or 1), -(-columns // (64 if tall else 32))

    def cost(splits: int) -> int:
        return -(-blocks * splits // multiprocessors) * max(parts(tiles, splits))

    allowed = [count for count in range(1, 9) if count <= tiles and min(parts(tiles, count)) > 0]
    assert splits in allowed
    assert splits == 1 or cost(splits) <= 0.9 * cost(1)
    assert all(cost(splits) * 0.9 < cost(other) for other in allowed), "another number would save a tenth"


@needs_emulation
@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize(("rows", "columns"), SPLIT_SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_forward_units_save_at_least_a_tenth_and_none_is_empty(
    rows: int, columns: int, symmetric: bool, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = rows if symmetric else columns
    monkeypatch.setenv("FASTSIMCLR_EMULATION_MULTIPROCESSORS", str(multiprocessors))
    unit = _extension.emulated.nt_xent_forward_column_unit(
        rows=rows, columns=columns, planes=1, width=128, symmetric=symmetric, device=0
    )
    row_blocks, column_blocks = -(-rows // 128), -(-columns // 128)
    assert unit % 128 == 0

    def cost(size: int) -> int:  # in blocks of 128 columns
        units = -(-column_blocks // size)
        if symmetric:
            return -(-units * (units + 1) // 2 // multiprocessors) * size**2
        return -(-row_blocks * units // multiprocessors) * size

    sizes = {-(-column_blocks // count) for count in range(1, 33)}
    assert unit // 128 in sizes, "at most 32 slots of sums"
    assert unit // 128 == column_blocks or cost(unit // 128) <= 0.9 * cost(column_blocks)
    assert all(cost(unit // 128) * 0.9 < cost(size) for size in sizes), "another size would save a tenth"


@needs_emulation
@pytest.mark.parametrize("precision", PLANES)
@pytest.mark.parametrize(("m", "d", "temperature"), [(130, 512, 0.05), (514, 128, 0.05), (514, 64, 0.005)])
def test_accuracy_with_the_splits_of_a_large_gpu(
    m: int, d: int, temperature: float, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSIMCLR_EMULATION_MULTIPROCESSORS", "264")  # an H100 runs two blocks on each of 132
    splits = _extension.emulated.nt_xent_backward_splits(rows=m, columns=m, planes=1, width=d, device=0)
    assert splits > 2, "the case does not have the intended splits"
    assert_as_accurate(
        row_losses("emulated", precision=precision),
        textbook_in_bf16(PLANES[precision]),
        [views(m // 2, d, torch.float32, noise=1.0)],
        temperature,
        g_rounding=2.0 ** (-8 * PLANES[precision]),
    )


@on_each_device
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_zero_rows_have_the_loss_and_gradient_of_normalize(device: str, backend: str, temperature: float) -> None:
    z1, z2 = to_device(device, *views(5, 4, torch.float32))
    z1[1] = z2[1] = 0  # a zero row with a zero positive
    z1[3] = 0
    z2[4] = 1e-14  # not 0, but below F.normalize's eps
    got = loss_and_gradients(row_losses(backend, precision="highest"), z1, z2, temperature)
    exact = loss_and_gradients(row_losses("reference"), z1.double(), z2.double(), temperature)
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 / temperature)


@on_each_device
def test_result_does_not_depend_on_the_memory_layout(device: str, backend: str) -> None:
    z1, z2 = to_device(device, *views(6, 4, torch.bfloat16))
    expected = loss_and_gradients(row_losses(backend), z1, z2, 0.1)
    wide = torch.zeros(6, 9, dtype=torch.bfloat16, device=device)
    wide[:, 1::2] = z1
    flat = torch.zeros(25, dtype=torch.bfloat16, device=device)
    flat[1:] = z2.flatten()
    layouts = [
        (wide[:, 1::2], z2.T.contiguous().T),  # a column stride, a row stride of 1
        (torch.stack([z2, z1])[1], flat[1:].view(6, 4)),  # rows that start at an odd address
    ]
    for a, b in layouts:
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        losses = nt_xent(a, b, backend=backend, reduction="none")
        assert torch.equal(losses.double(), expected[0])
        assert torch.equal(torch.cat(torch.autograd.grad(losses.mean(), (a, b))).double(), expected[1])

    row = z1[:1].clone().requires_grad_()  # expanded: stride 0, and all images equal
    copies = z1[:1].repeat(6, 1).requires_grad_()
    assert torch.equal(nt_xent(row.expand(6, 4), z2, backend=backend), nt_xent(copies, z2, backend=backend))


@on_each_device
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
@pytest.mark.parametrize("n", [1, 5])
def test_non_finite_projections_give_a_non_finite_loss(
    device: str, backend: str, value: float, temperature: float, n: int
) -> None:
    z1, z2 = to_device(device, *views(n, 4, torch.float32))
    z2[-1, 2] = value
    assert not nt_xent(z1, z2, temperature, backend=backend).isfinite()


@on_each_device
def test_loss_and_gradient_of_one_image_are_zero(device: str, backend: str) -> None:
    for temperature in (0.1, 0.005):
        losses, dz, dt = loss_and_gradients(
            row_losses(backend), *to_device(device, *views(1, 4, torch.float32)), temperature
        )
        assert losses.tolist() == [0, 0]
        assert dz.abs().max() == 0
        assert dt == 0


@on_each_device
def test_same_tensor_as_both_views_gets_both_gradients(device: str, backend: str) -> None:
    (z,) = (x.requires_grad_() for x in to_device(device, views(6, 4, torch.float32)[0]))
    a, b = (z.detach().clone().requires_grad_() for _ in range(2))
    (dz,) = torch.autograd.grad(nt_xent(z, z, backend=backend), z)
    da, db = torch.autograd.grad(nt_xent(a, b, backend=backend), (a, b))
    assert torch.equal(dz, da + db)


@on_each_device
def test_inference_and_repeated_backward(device: str, backend: str) -> None:
    z1, z2 = to_device(device, *views(6, 4, torch.float32))
    z2.requires_grad_()
    loss = nt_xent(z1, z2, backend=backend)  # only one view needs a gradient: a momentum encoder's z1
    first, second = (torch.autograd.grad(loss, z2, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(nt_xent(z1, z2, backend=backend), loss)
    with torch.inference_mode():
        assert torch.equal(nt_xent(z1, z2, backend=backend), loss)


@on_each_device
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_results_are_bit_identical_for_any_thread_order_and_uninitialized_memory(
    device: str, backend: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each emulated run has another random thread order; allocated memory is filled with NaN."""
    z1, z2 = to_device(device, *views(131, 20, torch.float32))
    results = []
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True
        for seed in range(3):
            monkeypatch.setenv("FASTSIMCLR_EMULATION_SEED", str(seed))
            results.append(loss_and_gradients(row_losses(backend), z1, z2, temperature))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.isfinite().all()
            assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------- temperature


@on_each_device
@pytest.mark.parametrize("temperature", [0.2, 0.005])
def test_temperature_is_a_float_a_tensor_or_a_learned_parameter(device: str, backend: str, temperature: float) -> None:
    z1, z2 = to_device(device, *views(6, 4, torch.float32, noise=0.2))
    expected = nt_xent(z1, z2, temperature, backend=backend)
    for dtype, where in itertools.product((torch.float32, torch.float64), {"cpu", device}):
        t = torch.tensor(temperature, dtype=dtype, device=where)
        torch.testing.assert_close(nt_xent(z1, z2, t, backend=backend), expected, rtol=1e-6, atol=0)

    module = NTXentLoss(nn.Parameter(torch.tensor(temperature, dtype=torch.float64, device=device)), backend=backend)
    module(z1, z2).backward()
    assert isinstance(module.temperature, nn.Parameter)
    _, _, exact = loss_and_gradients(row_losses("reference"), z1.double(), z2.double(), temperature)
    assert module.temperature.grad is not None
    assert module.temperature.grad.item() == pytest.approx(exact.item(), rel=2e-3)


@on_each_device
@pytest.mark.parametrize("temperature", [0.2, 0.005])
def test_kernels_read_the_temperature_on_the_device(device: str, backend: str, temperature: float) -> None:
    """Both sets of kernels are launched, and the one that is not for this temperature exits at once."""
    z1, z2 = to_device(device, *views(70, 4, torch.float32, noise=0.2))
    t = torch.tensor(temperature, device=device)
    known_on_host, on_device = (
        fused_forward(z1, z2, t, "", False, False, "highest", value) for value in (temperature, None)
    )
    for a, b in zip(known_on_host, on_device, strict=True):
        assert torch.equal(a, b)
    gradients = [
        fused_backward(torch.ones_like(known_on_host[0]), z1, z2, *known_on_host[1:], t, "", value)
        for value in (temperature, None)
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------- operators, compile


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [True, False])
# opcheck itself reads .grad of non-leaf tensors; PyTorch ignores that warning unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_operators_pass_opcheck(device: str, backend: str, dtype: torch.dtype, mean: bool) -> None:
    z1, z2 = (z.requires_grad_() for z in to_device(device, *views(5, 4, dtype)))
    for t, value in ((None, 0.2), (torch.tensor(0.2, device=device, requires_grad=True), None)):
        torch.library.opcheck(fused_forward, (z1, z2, t, "", mean, False, "highest", value))
        outputs = fused_forward(z1, z2, t, "", mean, False, "highest", value)
        loss, *saved = (x.detach() for x in outputs)
        t = None if t is None else t.detach()
        torch.library.opcheck(fused_backward, (torch.ones_like(loss), z1.detach(), z2.detach(), *saved, t, "", value))


def test_without_a_group_no_output_is_on_the_cpu() -> None:
    """A CPU output would keep Inductor from using CUDA graphs. Fake tensors need no GPU."""
    with FakeTensorMode():
        z = torch.empty(4, 8, device="cuda")
        outputs = fused_forward(z, z, None, "", True, False, "highest", 0.1)
    assert {output.device.type for output in outputs} == {"cuda"}


@on_each_device
@pytest.mark.parametrize("temperature", ["float", "learned"])
@pytest.mark.slow
def test_compiles_into_one_graph(device: str, backend: str, temperature: str) -> None:
    torch.compiler.reset()
    layer = nn.Linear(4, 4, device=device)

    def step(x1: Tensor, x2: Tensor, t: float | Tensor) -> Tensor:
        return nt_xent(layer(x1), layer(x2), t, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (6, 9):  # the second size makes the graph dynamic
        x1, x2 = to_device(device, *views(n, 4, torch.float32))
        results = []
        for run in (step, compiled):
            layer.zero_grad()
            t = nn.Parameter(torch.tensor(0.2, device=device)) if temperature == "learned" else 0.2
            loss = run(x1, x2, t)
            loss.backward()
            results.append([loss.detach(), layer.weight.grad] + ([t.grad] if isinstance(t, nn.Parameter) else []))
        for plain, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, plain, rtol=1e-5, atol=1e-6)


@on_each_device
def test_result_does_not_depend_on_autocast(device: str, backend: str) -> None:
    z1, z2 = to_device(device, *views(6, 4, torch.float32))
    plain = nt_xent(z1, z2, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(nt_xent(z1, z2, backend=backend), plain)


# ----------------------------------------------------------------------------------------------- only on a GPU


def gpu_test(function: Any) -> Any:
    for mark in gpu:
        function = mark(function)
    return function


@gpu_test
def test_cuda_graph_replays_on_new_data() -> None:
    z1, z2 = (z.requires_grad_() for z in to_device("cuda", *views(600, 128, torch.bfloat16)))
    new1, new2 = to_device("cuda", *views(600, 128, torch.bfloat16, seed=1))
    expected = loss_and_gradients(row_losses("fused"), new1, new2, 0.1)[1]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(nt_xent(z1, z2, backend="fused", reduction="none").mean(), (z1, z2))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dz = step()
    with torch.no_grad():
        z1.copy_(new1)
        z2.copy_(new2)
    graph.replay()
    assert torch.equal(torch.cat(dz).double(), expected)


@gpu_test
def test_runs_on_the_current_stream_without_synchronizing() -> None:
    z1, z2 = (z.requires_grad_() for z in to_device("cuda", *views(600, 128, torch.float32)))
    expected = torch.autograd.grad(nt_xent(z1, z2, backend="fused"), (z1, z2))
    t = nn.Parameter(torch.tensor(0.1, device="cuda"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            late1, late2 = (torch.zeros_like(z) for z in (z1, z2))
            torch.cuda._sleep(100_000_000)  # tens of milliseconds: kernels on another stream would read zeros
            late1.copy_(z1.detach())
            late2.copy_(z2.detach())
            late1.requires_grad_(), late2.requires_grad_()
            got = torch.autograd.grad(nt_xent(late1, late2, t, backend="fused"), (late1, late2, t))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for a, b in zip(expected, got[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@gpu_test
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_gpu_of_the_tensors() -> None:
    z1, z2 = views(70, 16, torch.float32)
    expected = loss_and_gradients(row_losses("fused"), *to_device("cuda:0", z1, z2), 0.1)
    with torch.cuda.device(0):
        got = loss_and_gradients(row_losses("fused"), *to_device("cuda:1", z1, z2), 0.1)
        assert torch.cuda.current_device() == 0
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@gpu_test
def test_offsets_past_2_31_elements() -> None:
    """M · D = 2^31 + 2^17 elements: the offsets of the last rows exceed 32 bits. Their expected losses are
    computed in float64 from a small batch."""
    n, d = 524_320, 2048
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    unit = torch.zeros(n, d, dtype=torch.bfloat16, device="cuda")
    few1, few2 = to_device("cuda", *views(8, d, torch.bfloat16))
    unit[:, 0] = 1
    z1, z2 = unit.clone(), unit
    z1[-8:], z2[-8:] = few1, few2
    losses = nt_xent(z1, z2, 1.0, backend="fused", reduction="none")
    z = torch.cat([few1, few2]).double()
    z = z / z.norm(dim=1, keepdim=True)
    s = z @ z.T
    others = 2 * (n - 8) * z[:, 0].exp()  # the similarity to each of the equal rows is the first number
    keep = 1 - torch.eye(16, dtype=torch.float64, device="cuda") - torch.eye(16, device="cuda").roll(8, 1)
    expected = torch.log1p((others + (s.exp() * keep).sum(1)) / s.diagonal(8).repeat(2).exp())
    torch.testing.assert_close(losses.view(2, n)[:, -8:].flatten().double(), expected, rtol=1e-4, atol=0)


# ----------------------------------------------------------------------------------------------- choice of the backend


def test_fused_without_a_gpu_raises_with_reason_and_fix() -> None:
    z = torch.ones(4, 3)
    with pytest.raises(BackendError, match=r"fused.*projections are on cpu.*use backend=\"auto\""):
        nt_xent(z, z, backend="fused")
    for kind in (ValueError, RuntimeError):  # BackendError is both
        with pytest.raises(kind, match="fused"):
            nt_xent(z, z, backend="fused")


@needs_emulation
@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.ones(4, 3, dtype=torch.float64), "float64.*expected float32, bfloat16 or float16"),
        (torch.ones(4, 2049), "2049.*at most 2048"),
        (torch.ones(1, 1).expand(2**29 + 1, 1), f"{2**30 + 2} views.*at most {2**30}"),  # before it allocates 32 GiB
    ],
)
def test_unsupported_dtype_or_size_raises(z: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(z, z, backend="emulated")


@needs_emulation
def test_failed_launch_raises_and_names_the_function() -> None:
    kernels = fused.Kernels(torch.ones(1), None, 0.1)
    z = torch.ones(2, 8)
    arguments = {"unit": 0, "norm": 0, "positive": 0, "dtype": kernels.dtype, "d": 8, "planes": 1, "width": 8}
    with pytest.raises(RuntimeError, match=r"nt_xent_normalize failed: cudaErrorInvalidValue"):
        kernels("normalize", z1=fused._view(z), z2=fused._view(z), n=0, **arguments)  # no blocks to launch


def test_auto_is_tiled_on_a_cpu_without_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nt_xent(torch.ones(4, 3), torch.ones(4, 3))
    name, why = choose_backend("auto", torch.device("cpu"))
    assert name == "tiled"
    assert "on cpu" in why


@gpu_test
def test_auto_is_fused_on_a_gpu_and_tiled_with_a_warning_for_unsupported_dtypes() -> None:
    assert choose_backend("auto", torch.device("cuda"))[0] == "fused"
    z = torch.randn(4, 3, dtype=torch.float64, device="cuda")
    with pytest.warns(UserWarning, match="tiled.*float64"):
        nt_xent(z, z)
