"""The NT-Xent loss, forward and backward: ours, the dense loss as everyone writes it, and other packages'.

    python -m pytest benchmarks/bench_nt_xent.py --benchmark-json=benchmarks/results/nt_xent-DEVICE.json

BENCH_M and BENCH_D choose the sizes (views, and numbers a projection): BENCH_M=4096 BENCH_D=64,128,256. BENCH_SECONDS:
sizes whose turn comes later than that are skipped; on a GPU those with a target come first. BENCH_SMALL=1: 256 views,
two rounds, nothing compiled.

Each size is timed as a whole step (forward and backward) and as the forward of one, and on a GPU both again, replayed
from a CUDA graph, where a call from Python costs more than the kernels. Who can't be captured is timed as called there,
and the table says so. On a GPU a call's time is that of several in a row, then one wait for the device.

Beside them runs a plain matrix product: bf16 of 8192 on a GPU, float32 of 2048 on a CPU. TFLOP/s count 5 M^2 D, what
the fused kernel does (M^2 D in the forward, of which it computes the upper triangle; 4 M^2 D in the backward), for
whoever it is; so they compare like the times do. The tiled loss itself needs 4 M^2 D (both its passes use that the
similarities are symmetric); what these take at the product's rate is the least that it could take.
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
from dataclasses import asdict, dataclass, field, replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.interleaved import Check, Spread, Timing, describe, interleave
from benchmarks.memory import peak_mib, settle_heap
from benchmarks.nt_xent_contenders import Contender, contenders
from benchmarks.sizes import SMALL

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DEVICE_NAME = torch.cuda.get_device_name() if ON_GPU else "cpu"
STEP, FORWARD = "forward + backward", "forward"
MATMUL = "matrix product"
MATRIX, MATRIX_DTYPE = (8192, torch.bfloat16) if ON_GPU else (512 if SMALL else 2048, torch.float32)
LARGEST_REPLAYED = 32768  # above, a call from Python is lost in the kernels' time


@dataclass(frozen=True)
class Target:
    """What we mean to reach in a step. device: part of its name; views, width: the size, None for any from 2048 on."""

    device: str
    views: int | None
    width: int | None
    figure: str
    at_most: float | None = None
    at_least: float | None = None

    def applies(self, views: int, width: int) -> bool:
        right_views = views >= 2048 if self.views is None else views == self.views
        return self.device in DEVICE_NAME and right_views and self.width in (None, width)

    def verdict(self, got: float) -> str:
        if self.at_most is not None:
            return f"{self.figure} at most {self.at_most}: {'met' if got <= self.at_most else 'MISSED'} ({got:.3g})"
        assert self.at_least is not None
        return f"{self.figure} at least {self.at_least}: {'met' if got >= self.at_least else 'MISSED'} ({got:.3g})"


FASTER_THAN = "times faster than "
TARGETS = (
    Target("H200", 8192, 128, "ms", at_most=0.095),
    Target("H200", 32768, 128, "ms", at_most=1.35),
    Target("H200", 131072, 256, "ms", at_most=43.0),
    Target("H200", 8192, 128, FASTER_THAN + "dense", at_least=10.0),
    Target("H200", None, None, FASTER_THAN + "anyone else", at_least=1.0),
    Target("cpu", 4096, 128, FASTER_THAN + "dense", at_least=3.0),
    Target("cpu", 4096, 128, FASTER_THAN + "dense, torch.compile", at_least=1.4),
    Target("cpu", 4096, 128, FASTER_THAN + "lightly", at_least=3.0),
    Target("cpu", 8192, 128, "peak MiB", at_most=64.0),
    Target("cpu", 8192, 128, "times its products at sgemm's rate", at_most=1.6),
)


def numbers(variable: str, default: str) -> list[int]:
    return [int(number) for number in os.environ.get(variable, default).split(",")]


def sizes() -> list[tuple[int, int]]:
    """(views, width); those with a target of their own first, then those of width 128: time may be short."""
    views = numbers("BENCH_M", "256" if SMALL else "512,2048,8192,32768,131072" if ON_GPU else "512,2048,4096,8192")
    widths = numbers("BENCH_D", "64,128,256" if ON_GPU and not SMALL else "128")
    targeted = {(target.views, target.width) for target in TARGETS}
    pairs = list(itertools.product(views, widths))
    return sorted(pairs, key=lambda size: (size not in targeted, size[1] != 128)) if ON_GPU else pairs


CASES = [
    (views, width, replayed, part)
    for views, width in sizes()
    for replayed in ((False, True) if ON_GPU and views <= LARGEST_REPLAYED else (False,))
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
        size = Size(z1, z2, *contenders(views, width, DEVICE))
        results: dict[str, tuple[Tensor, ...]] = {}
        for name, contender in list(size.found.items()):
            try:
                results[name] = size.run(name, STEP)
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
    size.losses = {name: float(result[0]) for name, result in results.items()}
    size.errors = {name: relative_errors(result, results[size.reference]) for name, result in results.items()}
    for name, contender in list(size.found.items()):
        bounds = contender.bound or (float("inf"), float("inf"))
        if not all(error <= bound for error, bound in zip(size.errors[name], bounds, strict=True)):
            problem = f"another function: relative errors of loss and gradients {size.errors[name]}, beyond {bounds}"
            assert not contender.ours, f"{name}: {problem}"
            size.missing[name] = problem
            del size.found[name]
    return size


def checked_again(size: Size, steps: dict[str, Callable[[], tuple[Tensor, ...]]]) -> dict[str, Check]:
    """After timing, what was timed computes the same function still, in the precision that it claims."""
    expected = tuple(each.clone() for each in steps[size.reference]())
    checks = {}
    for name, step in steps.items():
        loss, gradients = relative_errors(step(), expected)
        if bound := size.found[name].bound:
            Check("gradients, relative", gradients, bound[1])
            checks[name] = Check("loss, relative", loss, bound[0])
    return checks


def remarks(size: Size, refused: dict[str, str]) -> dict[str, str]:
    """Of each contender, what its figures don't say."""
    notes: dict[str, list[str]] = {name: [] for name in size.found}
    for name, (loss, gradients) in size.errors.items():
        if name in size.found and size.found[name].bound is None:
            notes[name] += [f"of less precision: loss {loss:.1g}, gradients {gradients:.1g} off {size.reference}"]
    for name, why in refused.items():
        notes[name] += [f"timed as called, not captured: {why}"]
    return {name: "; ".join(of_one) for name, of_one in notes.items() if of_one}


def capture(size: Size, name: str, part: str) -> Callable[[], tuple[Tensor, ...]]:
    """A replay of the step from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            size.run(name, part)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = size.run(name, part)
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
                replays[name] = capture(size, name, part)
                del refused[name]
            except Exception as error:  # out of memory, too: each graph has memory of its own
                refused[name] = one_line(error)
    return replays, refused


def repeated(step: Callable[[], object], times: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def per_call(timing: Timing, repeats: int) -> Timing:
    def divided(spread: Spread) -> Spread:
        return Spread(*(each / repeats for each in (spread.median, spread.lower, spread.upper)))

    return replace(timing, milliseconds={name: divided(spread) for name, spread in timing.milliseconds.items()})


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
    rivals = [ratio.median for name, ratio in timing.speedup.items() if name != MATMUL and not name.startswith("fused")]
    figures[FASTER_THAN + "anyone else"] = min(rivals)
    # From the ratios of the rounds, so that a slow second does not count.
    figures["times its products at sgemm's rate"] = (
        2 * MATRIX**3 / (4 * views**2 * width) / timing.speedup[MATMUL].median
    )
    judged = part == STEP and replayed == (ON_GPU and views <= LARGEST_REPLAYED)
    targets = [target for target in TARGETS if judged and target.applies(views, width)]
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
    lines += [f"  {name:26} not here: {why}" for name, why in size.missing.items()]
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
        missing=size.missing,
        notes=remarks(size, refused),
        ours=[name for name in others if size.found[name].ours],
        yardsticks=[MATMUL],
        differing=[name for name in others if size.found[name].bound is None],
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
