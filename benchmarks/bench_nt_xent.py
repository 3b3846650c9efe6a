"""The NT-Xent loss, forward and backward: ours, the dense loss as everyone writes it, and other packages'.

    python -m pytest benchmarks/bench_nt_xent.py --benchmark-json=benchmarks/results/nt_xent-DEVICE.json

BENCH_SIZES=8192x128,32768x128 selects the sizes (views x width of a projection). BENCH_SECONDS skips the sizes that
would start later than that; on a GPU those with a target come first. BENCH_RIVALS=0 times only our fastest
implementation in both precisions, on a GPU as CUDA-graph replays, and checks them against one call of the tiled loss.
BENCH_SMALL=1: 256 views, two rounds, nothing compiled.

Each size is timed as a whole step (forward and backward) and as the forward of one, and on a GPU both again, replayed
from a CUDA graph, where a call from Python costs more than the kernels. Who can't be captured is timed as called there,
and the table says so. On a GPU a call's time is that of several in a row, then one wait for the device.

Beside them runs a plain matrix product: bf16 of 8192 on a GPU, float32 of 2048 on a CPU. Without rivals a second one
multiplies all pairs of rows (views x width by width x views) and writes the result, which the loss never does.

TFLOP/s count 5 M^2 D for every contender, which is what the fused kernel computes (the upper triangle of M^2 D in the
forward, 4 M^2 D in the backward); so they compare as the times do. The tiled loss itself needs 4 M^2 D, as both its
passes use that the similarities are symmetric; the time of these at the product's rate is its lower bound.

Peak memory is what torch's allocator holds at most beyond the inputs, gradients included (on a CPU torch.profiler sees
it; scratch that a matrix library takes by itself is not in it). Who runs out of memory is recorded as missing.

Leave the machine alone meanwhile, or measure one thread (OMP_NUM_THREADS=1). A loss in many small steps waits for its
slowest thread at each of them: where another process takes a core, it suffers far more than one in a few large steps,
and no ratio mends that.

"medium" allows bf16 products. The tiled loss on a CPU: oneDNN uses bf16 where the CPU multiplies it fast (AMX), and
else its own float32 product, which on a CPU that is not Intel's may be twice as fast as torch.mm's; on a GPU: TF32.
"""

import functools
import gc
import itertools
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.interleaved import Check, describe, interleave
from benchmarks.memory import peak_mib, settle_heap
from benchmarks.nt_xent_contenders import Contender, contenders, our_losses
from benchmarks.nt_xent_targets import FASTER_THAN, TARGETS
from benchmarks.replays import capture, per_call, repeated
from benchmarks.sizes import SMALL

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DEVICE_NAME = torch.cuda.get_device_name() if ON_GPU else "cpu"
STEP, FORWARD = "forward + backward", "forward"
MATMUL = "matrix product"
MATRIX, MATRIX_DTYPE = (8192, torch.bfloat16) if ON_GPU else (512 if SMALL else 2048, torch.float32)
PAIRS = "matrix product of all pairs"
WITH_RIVALS = os.environ.get("BENCH_RIVALS") != "0"
LARGEST_REPLAYED = 32768  # above, a call from Python is lost in the kernels' time


def sizes() -> list[tuple[int, int]]:
    """(views, width). On a GPU sizes with a target come first, then those of width 128: time may run out."""
    if named := os.environ.get("BENCH_SIZES"):
        return [(int(views), int(width)) for views, width in (size.split("x") for size in named.split(","))]
    if SMALL or not ON_GPU:
        return [(views, 128) for views in ((256,) if SMALL else (512, 2048, 4096, 8192))]
    targeted = {(target.views, target.width) for target in TARGETS}
    pairs = itertools.product((512, 2048, 8192, 32768, 131072), (64, 128, 256))
    return sorted(pairs, key=lambda size: (size not in targeted, size[1] != 128))


def is_replayed(views: int) -> tuple[bool, ...]:
    """Whether a size is timed as called, as replayed, or as both."""
    if not ON_GPU:
        return (False,)
    if not WITH_RIVALS:
        return (True,)
    return (False, True) if views <= LARGEST_REPLAYED else (False,)


CASES = [
    (views, width, replayed, part)
    for views, width in sizes()
    for replayed in is_replayed(views)
    for part in (STEP, FORWARD)
]
STARTED = time.monotonic()


@dataclass
class Size:
    """The inputs of one size, who computes their loss, and what does not depend on how it is timed."""

    z1: Tensor
    z2: Tensor
    found: dict[str, Contender]
    missing: dict[str, str]
    losses: dict[str, float] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # relative, of the loss and of the gradients
    reference: str = ""
    expected: tuple[Tensor, ...] = ()
    """The loss and the gradients by `reference`."""
    peak_mib: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, part: str) -> tuple[Tensor, ...]:
        loss = self.found[name].loss(self.z1, self.z2)
        return (loss.detach(), *(torch.autograd.grad(loss, (self.z1, self.z2)) if part == STEP else ()))


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def relative_errors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[float, float]:
    """Of the loss; and of the gradients, zero where there are none."""
    gradients = [float((a - b).norm() / b.norm()) for a, b in zip(got[1:], expected[1:], strict=True)]
    return float((got[0] - expected[0]).abs() / expected[0].abs()), max(gradients, default=0.0)


@functools.lru_cache(maxsize=1)  # its tests come in a row; they share what is compiled
def prepare(views: int, width: int) -> Size:
    free_memory()
    torch.manual_seed(0)
    settle_heap()
    x = torch.randn(views // 2, width, device=DEVICE)
    # A loss of about 0.1 to 1, as in training: views that have much in common.
    z1, z2 = ((x + 0.5 * torch.randn_like(x)).requires_grad_() for _ in range(2))
    with warnings.catch_warnings():  # other packages' imports, and what the compiler has to say
        warnings.simplefilter("ignore")
        size = Size(z1, z2, *(contenders(views, width, DEVICE) if WITH_RIVALS else our_losses(DEVICE)))
        kind = next(iter(size.found)).partition(",")[0]
        timed = [name for name in size.found if WITH_RIVALS or name.partition(",")[0] == kind]
        if not WITH_RIVALS:
            size.found = {name: each for name, each in size.found.items() if name in timed or name == "tiled"}
        results: dict[str, tuple[Tensor, ...]] = {}
        for name, contender in list(size.found.items()):
            try:
                results[name] = size.run(name, STEP)
                if name in timed:
                    size.peak_mib[name] = peak_mib(lambda name=name: size.run(name, STEP))  # type: ignore[misc]
            except torch.OutOfMemoryError:
                size.missing[name] = "out of memory"
            except Exception as error:
                if contender.ours:
                    raise
                size.missing[name] = f"it does not run here: {one_line(error)}"
            if name in size.missing:
                del size.found[name]
                results.pop(name, None)
                free_memory()
    size.reference = "dense" if "dense" in results else "tiled"
    size.expected = results[size.reference]
    size.losses = {name: float(result[0]) for name, result in results.items()}
    size.found = {name: each for name, each in size.found.items() if name in timed}
    same_work = {name for name, each in size.found.items() if not each.other_work}
    size.errors = {name: relative_errors(results[name], size.expected) for name in results if name in same_work}
    for name, contender in list(size.found.items()):
        if contender.other_work:
            continue
        bounds = contender.bound or (float("inf"), float("inf"))
        if not all(error <= bound for error, bound in zip(size.errors[name], bounds, strict=True)):
            problem = f"another function: relative errors of loss and gradients {size.errors[name]}, beyond {bounds}"
            assert not contender.ours, f"{name}: {problem}"
            size.missing[name] = problem
            del size.found[name]
    return size


def checked_again(size: Size, steps: dict[str, Callable[[], tuple[Tensor, ...]]]) -> dict[str, Check]:
    """After timing, check that what was timed still computes the same function, in the precision that it claims."""
    checks = {}
    for name, step in steps.items():
        if bound := size.found[name].bound:
            result = step()
            loss, gradients = relative_errors(result, size.expected[: len(result)])
            Check("gradients, relative", gradients, bound[1])
            checks[name] = Check("loss, relative", loss, bound[0])
    return checks


def remarks(size: Size, refused: dict[str, str]) -> dict[str, str]:
    """By contender: what its figures don't say."""
    notes: dict[str, list[str]] = {name: [] for name in size.found}
    for name, contender in size.found.items():
        if contender.other_work:
            notes[name] += [contender.other_work]
    for name, (loss, gradients) in size.errors.items():
        if name in size.found and size.found[name].bound is None:
            notes[name] += [f"of less precision: loss {loss:.1g}, gradients {gradients:.1g} off {size.reference}"]
    for name, why in refused.items():
        notes[name] += [f"timed as called, not captured: {why}"]
    return {name: "; ".join(of_one) for name, of_one in notes.items() if of_one}


def capture_step(size: Size, name: str, part: str) -> Callable[[], tuple[Tensor, ...]]:
    """A replay of the step from a CUDA graph."""
    graph, result = capture(lambda: size.run(name, part))
    loss = result[0]
    loss.fill_(torch.nan)  # the replay has to write it

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return result

    replay()
    if not abs(float(loss) - size.losses[name]) <= 1e-4 * abs(size.losses[name]):
        raise RuntimeError(f"a replay's loss is {float(loss)}, a call's {size.losses[name]}")
    return replay


def capture_all(size: Size, part: str) -> tuple[dict[str, Callable[[], tuple[Tensor, ...]]], dict[str, str]]:
    """Replays by name; and of those that have none, why."""
    replays: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    refused: dict[str, str] = {}
    for name, contender in size.found.items():
        free_memory()
        refused[name] = contender.not_captured
        if not contender.not_captured:
            try:
                replays[name] = capture_step(size, name, part)
                del refused[name]
            except Exception as error:  # out of memory, too: each graph has memory of its own
                refused[name] = one_line(error)
    return replays, refused


def product_of_pairs(size: Size) -> tuple[Callable[[], object] | None, str]:
    """A product of the loss's own size, in bf16 and with its result in memory; or None and the reason."""
    rows = torch.cat([size.z1, size.z2]).detach().to(MATRIX_DTYPE)
    try:
        pairs = torch.empty(len(rows), len(rows), dtype=MATRIX_DTYPE, device=DEVICE)
    except torch.OutOfMemoryError:
        return None, "out of memory"

    def product() -> Tensor:
        return torch.mm(rows, rows.T, out=pairs)

    if not ON_GPU:
        return product, ""
    graph, _ = capture(product)

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return rows, pairs  # which live as long as the graph that uses them

    return replay, ""


@pytest.mark.filterwarnings("default")  # shown: other packages' are no reason to stop
@pytest.mark.parametrize(
    ("views", "width", "replayed", "part"),
    CASES,
    ids=[f"{m}-{d}-{part.replace(' ', '')}-{'replayed' if replayed else 'called'}" for m, d, replayed, part in CASES],
)
def test_nt_xent(
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
    views: int,
    width: int,
    replayed: bool,
    part: str,
) -> None:
    if time.monotonic() - STARTED > float(os.environ.get("BENCH_SECONDS", "inf")):
        pytest.skip("BENCH_SECONDS are over")
    benchmark.group = f"NT-Xent, {part}{', replayed' if replayed else ''}"
    size = prepare(views, width)
    replays, refused = capture_all(size, part) if replayed else ({}, {})
    repeats = min(20, max(1, 81920 // views)) if ON_GPU else 1
    a, b = (torch.randn(MATRIX, MATRIX, device=DEVICE, dtype=MATRIX_DTYPE) for _ in range(2))
    product = torch.empty_like(a)

    steps = {name: replays.get(name) or functools.partial(size.run, name, part) for name in size.found}
    calls = {name: repeated(step, repeats) for name, step in steps.items()}
    calls[MATMUL] = repeated(lambda: torch.mm(a, b, out=product), repeats)
    missing = dict(size.missing)
    if not WITH_RIVALS:
        product_of_its_size, missing[PAIRS] = product_of_pairs(size)
        if product_of_its_size:
            calls[PAIRS] = repeated(product_of_its_size, repeats)
            del missing[PAIRS]
    slow = views >= (131072 if ON_GPU else 8192)
    rounds = 2 if SMALL else (5 if ON_GPU else 7) if slow else 15
    warmup_rounds = 1 if slow or SMALL else 3
    timing = interleave(benchmark, calls, rounds=rounds, warmup_rounds=warmup_rounds, synchronize=synchronize)
    timing = per_call(timing, repeats)
    checks = checked_again(size, steps)

    flop = (5 if part == STEP else 1) * views**2 * width
    matmul_tflops = 2 * MATRIX**3 / timing.milliseconds[MATMUL].median / 1e9
    ours, *others = size.found
    tflops = {name: flop / timing.milliseconds[name].median / 1e9 for name in size.found}
    figures = {"ms": timing.milliseconds[ours].median, "peak MiB": size.peak_mib[ours]}
    figures |= {FASTER_THAN + name: ratio.median for name, ratio in timing.speedup.items()}
    yardsticks = [name for name in calls if name not in size.found or size.found[name].other_work]
    rivals = [
        ratio.median
        for name, ratio in timing.speedup.items()
        if name not in yardsticks and not name.startswith("fused")
    ]
    if rivals:
        figures[FASTER_THAN + "anyone else"] = min(rivals)
    # From the ratios of the rounds, so that a slow second does not count.
    figures["times its products at sgemm's rate"] = (
        2 * MATRIX**3 / (4 * views**2 * width) / timing.speedup[MATMUL].median
    )
    judged = part == STEP and replayed == is_replayed(views)[-1]
    targets = [target for target in TARGETS if judged and target.applies(DEVICE_NAME, views, width)]
    verdicts = [target.verdict(figures[target.figure]) for target in targets if target.figure in figures]

    lines = [
        f"NT-Xent {part}{', replayed from CUDA graphs' if replayed else ''}: {views} views of {width} float32 on "
        f"{DEVICE_NAME}; {timing.rounds} rounds of {repeats}, median (quartiles)"
    ]
    for name in size.found:
        ratio = f"{timing.speedup[name].median:.2f} x" if name in timing.speedup else ""
        lines.append(
            f"  {name:26} {timing.milliseconds[name]!s:>28} ms {ratio:>9} {tflops[name]:8.3g} TFLOP/s "
            f"{100 * tflops[name] / matmul_tflops:5.1f} % {size.peak_mib[name]:9.1f} MiB"
            + (" as called" if name in refused else "")
        )
    lines.append(f"  {MATMUL:26} {timing.milliseconds[MATMUL]!s:>28} ms {'':9} {matmul_tflops:8.3g} TFLOP/s")
    if PAIRS in calls:
        lines.append(f"  {PAIRS:26} {timing.milliseconds[PAIRS]!s:>28} ms")
    lines += [f"  {name:26} not here: {why}" for name, why in missing.items()]
    lines += [f"  {name:26} not captured: {why}" for name, why in refused.items()]
    lines += [f"  target, {verdict}" for verdict in verdicts]
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    describe(
        benchmark,
        device=DEVICE_NAME,
        sizes={"views": views, "width": width},
        peak_mib={name: size.peak_mib[name] for name in size.found} if part == STEP else {},
        checks=checks,
        missing=missing,
        notes=remarks(size, refused),
        ours=[name for name in others if size.found[name].ours],
        yardsticks=yardsticks,
        differing=[name for name in others if size.found[name].bound is None and name not in yardsticks],
        headline=any(target.views for target in targets),
    )
    benchmark.extra_info.update(
        asdict(timing),  # of a call; pytest-benchmark's own columns are of `repeats` calls
        repeats=repeats,
        flop=flop,
        tflops=tflops,
        matmul=f"{MATRIX} x {MATRIX} {MATRIX_DTYPE}",
        matmul_tflops=matmul_tflops,
        fraction_of_matmul_rate={name: rate / matmul_tflops for name, rate in tflops.items()},
        peak_mib_measured_by="torch.cuda" if ON_GPU else "torch.profiler",
        relative_errors_of_loss_and_gradients=size.errors,
        relative_to=size.reference,
        targets=verdicts,
    )
