"""The NT-Xent loss, forward and backward: ours, the dense loss as everyone writes it, and other packages'.

    python -m pytest benchmarks/bench_nt_xent.py --benchmark-json=benchmarks/results/nt_xent-DEVICE.json

BENCH_SIZES=8192x128,32768x128 selects the sizes (views x width of a projection). BENCH_RIVALS=0 times only our fastest
implementation in both precisions, and checks them against one call of the tiled loss.

Each size is timed as a whole step (forward and backward) and as the forward of one. On a GPU a call's time is that of
several in a row, then one wait for the device. Beside them runs a plain matrix product: bf16 of 8192 on a GPU, float32
of 2048 on a CPU. The tiled loss needs 4 M^2 D, as both its passes use that the similarities are symmetric; the time of
these at the product's rate is its lower bound. Peak memory is what torch's allocator holds at most beyond the inputs,
gradients included.

Leave the machine alone meanwhile, or measure one thread (OMP_NUM_THREADS=1): where another process takes a core, a loss
in many small steps suffers far more than one in a few large steps, and no ratio corrects that.
"""

import functools
import gc
import itertools
import os
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from benchmarks.memory import peak_mib, settle_heap
from benchmarks.nt_xent_contenders import Contender, contenders, our_losses
from benchmarks.suite import (
    DEVICE,
    DEVICE_NAME,
    ON_GPU,
    SMALL,
    Check,
    Suite,
    Timing,
    one_line,
    relative_error,
    verdict,
)

STEP, FORWARD = "forward + backward", "forward"
MATMUL = "matrix product"
MATRIX, MATRIX_DTYPE = (8192, torch.bfloat16) if ON_GPU else (512 if SMALL else 2048, torch.float32)
WITH_RIVALS = os.environ.get("BENCH_RIVALS") != "0"
# By parts of the device's name, then (views, width): what is bounded, and how. On Hopper: what mma.sync kernels reach
# at 75 to 85 % of the bounds of shared memory and tensor cores.
FASTER_THAN = "times faster than "
HOPPER = {
    (8192, 128): {"ms": {"at_most": 0.155}, FASTER_THAN + "dense": {"at_least": 10}},
    (32768, 128): {"ms": {"at_most": 2.1}},
    (131072, 256): {"ms": {"at_most": 90}},
}
TARGETS = {
    "H100": HOPPER,
    "H200": HOPPER,
    "cpu": {
        (4096, 128): {
            FASTER_THAN + "dense": {"at_least": 3},
            FASTER_THAN + "dense, torch.compile": {"at_least": 1.4},
            FASTER_THAN + "lightly": {"at_least": 3},
        },
        (8192, 128): {"peak MiB": {"at_most": 64}, "times its products at sgemm's rate": {"at_most": 1.6}},
    },
}


def sizes() -> list[tuple[int, int]]:
    """(views, width). On a GPU sizes with a target come first, then those of width 128: time may run out."""
    if named := os.environ.get("BENCH_SIZES"):
        return [(int(num_views), int(width)) for num_views, width in (size.split("x") for size in named.split(","))]
    if SMALL or not ON_GPU:
        return [(num_views, 128) for num_views in ((256,) if SMALL else (512, 2048, 4096, 8192))]
    pairs = itertools.product((512, 2048, 8192, 32768, 131072), (64, 128, 256))
    return sorted(pairs, key=lambda size: (size not in HOPPER, size[1] != 128))


@dataclass
class Size:
    """The inputs of one size, and the losses that run at it."""

    z1: Tensor
    z2: Tensor
    found: dict[str, Contender]
    missing: dict[str, str]
    expected: tuple[Tensor, ...] = ()
    """The dense loss and its gradients, or where it does not fit those of the tiled loss."""
    peak_mib: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, part: str) -> tuple[Tensor, ...]:
        loss = self.found[name].loss(self.z1, self.z2)
        return (loss.detach(), *(torch.autograd.grad(loss, (self.z1, self.z2)) if part == STEP else ()))

    def errors(self, result: tuple[Tensor, ...]) -> tuple[float, float]:
        """Relative errors of the loss and of the gradients, zero where there are none."""
        apart = [relative_error(*pair) for pair in zip(result, self.expected, strict=False)]
        return apart[0], max(apart[1:], default=0.0)


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


PREPARED: dict[tuple[int, int], Size] = {}  # of one size: its tests come in a row, and share what is compiled


def prepare(num_views: int, width: int, compiling: bool) -> Size:
    free_memory()
    torch.manual_seed(0)
    settle_heap()
    x = torch.randn(num_views // 2, width, device=DEVICE)
    # A loss of about 0.1 to 1, as in training: views that have much in common.
    z1, z2 = ((x + 0.5 * torch.randn_like(x)).requires_grad_() for _ in range(2))
    with warnings.catch_warnings():  # other packages' imports, and the compiler's
        warnings.simplefilter("ignore")
        size = Size(
            z1, z2, *(contenders(num_views, DEVICE, compiling=compiling) if WITH_RIVALS else our_losses(DEVICE))
        )
        for name, contender in list(size.found.items()):
            try:
                size.run(name, STEP)
                size.peak_mib[name] = peak_mib(lambda name=name: size.run(name, STEP))  # type: ignore[misc]
            except Exception as error:
                if contender.ours and not isinstance(error, torch.OutOfMemoryError):
                    raise
                size.missing[name] = one_line(error)
                del size.found[name]
                free_memory()
    size.expected = size.run("dense" if "dense" in size.found else "tiled", STEP)
    if not WITH_RIVALS:
        kind = next(iter(size.found)).partition(",")[0]
        size.found = {name: each for name, each in size.found.items() if name.partition(",")[0] == kind}
    return size


def judge(timing: Timing, size: Size, num_views: int, width: int) -> tuple[list[str], bool]:
    """Verdicts on this size's targets, and whether it has any."""
    ours = next(iter(size.found))
    figures = {"ms": timing.milliseconds[ours].median, "peak MiB": size.peak_mib[ours]}
    figures |= {FASTER_THAN + name: ratio.median for name, ratio in timing.speedup.items()}
    # From the ratios of the rounds, so that a slow second does not count.
    figures["times its products at sgemm's rate"] = (
        2 * MATRIX**3 / (4 * num_views**2 * width) / timing.speedup[MATMUL].median
    )
    by_size = next((each for device, each in TARGETS.items() if device in DEVICE_NAME), {})
    targets = by_size.get((num_views, width), {})
    return [verdict(what, figures[what], **bound) for what, bound in targets.items() if what in figures], bool(targets)


@pytest.mark.filterwarnings("default")  # other packages' warnings are no reason to stop
@pytest.mark.parametrize(
    ("num_views", "width", "part"),
    [pytest.param(*size, part, id=f"{size[0]}-{size[1]}-{part}") for size in sizes() for part in (STEP, FORWARD)],
)
def test_nt_xent(suite: Suite, num_views: int, width: int, part: str) -> None:
    suite.benchmark.group = f"NT-Xent, {part}"
    if (num_views, width) not in PREPARED:
        PREPARED.clear()
        PREPARED[num_views, width] = prepare(num_views, width, suite.may_compile())
    size = PREPARED[num_views, width]
    steps = {name: functools.partial(size.run, name, part) for name in size.found}
    a, b = (torch.randn(MATRIX, MATRIX, device=DEVICE, dtype=MATRIX_DTYPE) for _ in range(2))
    product = torch.empty_like(a)
    timing = suite.interleave(
        {**steps, MATMUL: lambda: torch.mm(a, b, out=product)},
        sizes={"views": num_views, "width": width},
        rounds=2 if SMALL else 15,
        repeats=min(20, max(1, 81920 // num_views)) if ON_GPU else 1,
    )
    checks, notes = {}, {}
    for name, contender in size.found.items():
        loss, gradients = size.errors(steps[name]())
        if contender.bound:
            Check("gradients, relative", gradients, contender.bound[1])
            checks[name] = Check("loss, relative", loss, contender.bound[0])
        else:
            of_step = f", gradients {gradients:.1g}" if part == STEP else ""
            notes[name] = f"of less precision: loss {loss:.1g}{of_step} off float32"
    targets, has_targets = judge(timing, size, num_views, width) if part == STEP else ([], False)
    _, *others = size.found
    suite.record(
        peak_mib=size.peak_mib if part == STEP else {},
        checks=checks,
        missing=size.missing,
        notes=notes,
        ours=[name for name in others if size.found[name].ours],
        yardsticks=[MATMUL],
        differing=[name for name in others if size.found[name].bound is None],
        headline=has_targets,
    )
    suite.judge(*targets)
