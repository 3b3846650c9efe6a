"""Forward and backward of the NT-Xent loss: fastsimclr, the usual dense implementation, and other packages.

    python -m pytest benchmarks/bench_nt_xent.py --benchmark-json=benchmarks/results/nt_xent-DEVICE.json

BENCH_SIZES=8192x128,32768x128 selects the sizes (views x width of a projection). BENCH_RIVALS=0 leaves out the
alternatives: only fastsimclr's fastest implementation is timed, in both precisions, and checked against one call of the
tiled loss.

Each size is timed as a whole step (forward and backward) and as its forward alone. On a GPU, several calls in a row are
timed with one synchronization. A plain matrix product is timed with them: 8192 x 8192 in bf16 on a GPU, 2048 x 2048 in
float32 on a CPU. The tiled loss needs 4 M^2 D operations, as forward and backward both exploit the symmetry of the
similarities; the time of these operations at the rate of the matrix product is its lower bound. Peak memory is the peak
of torch's allocator beyond the inputs, including the gradients.

Run nothing else on the machine meanwhile, or measure one thread (OMP_NUM_THREADS=1). If another process takes a core, a
loss of many small operations suffers far more than one of a few large operations, and the ratios do not correct that.
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
from benchmarks.nt_xent_contenders import Contender, contenders, fastsimclr_losses
from benchmarks.suite import (
    DEVICE,
    DEVICE_NAME,
    ON_GPU,
    SMALL,
    Check,
    Suite,
    Timing,
    error_line,
    relative_error,
    verdict,
)

STEP, FORWARD = "forward + backward", "forward"
MATMUL = "matrix product"
MATRIX, MATRIX_DTYPE = (8192, torch.bfloat16) if ON_GPU else (512 if SMALL else 2048, torch.float32)
WITH_ALTERNATIVES = os.environ.get("BENCH_RIVALS") != "0"
# The paper's batch size of 4096 images: the size in the README.
README_SIZE = (8192, 128)
# Targets by part of the device's name, then by (views, width). On Hopper: what kernels with mma.sync reach at 75 to
# 85 % of the limits of shared memory and tensor cores.
FASTER_THAN = "times faster than "
OVER_PRODUCTS = "time relative to its matrix products at the rate of sgemm"
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
        (8192, 128): {
            "peak MiB": {"at_most": 64},
            OVER_PRODUCTS: {"at_most": 1.6},
        },
    },
}


def sizes() -> list[tuple[int, int]]:
    """Return (views, width) pairs. On a GPU, sizes with a target come first, then width 128, as time may run out."""
    if selected := os.environ.get("BENCH_SIZES"):
        return [(int(num_views), int(width)) for num_views, width in (size.split("x") for size in selected.split(","))]
    if SMALL or not ON_GPU:
        return [(num_views, 128) for num_views in ((256,) if SMALL else (512, 2048, 4096, 8192))]
    pairs = itertools.product((512, 2048, 8192, 32768, 131072), (64, 128, 256))
    return sorted(pairs, key=lambda size: (size not in HOPPER, size[1] != 128))


@dataclass
class Size:
    """Inputs of one size, and the contenders that can run at it."""

    z1: Tensor
    z2: Tensor
    contenders: dict[str, Contender]
    missing: dict[str, str]
    expected: tuple[Tensor, ...] = ()
    """The dense loss and its gradients; those of the tiled loss if the dense one runs out of memory."""
    peak_mib: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, part: str) -> tuple[Tensor, ...]:
        loss = self.contenders[name].loss(self.z1, self.z2)
        return (loss.detach(), *(torch.autograd.grad(loss, (self.z1, self.z2)) if part == STEP else ()))

    def errors(self, result: tuple[Tensor, ...]) -> tuple[float, float]:
        """Return the relative errors of the loss and of the gradients; the latter is 0 without gradients."""
        errors = [relative_error(*pair) for pair in zip(result, self.expected, strict=False)]
        return errors[0], max(errors[1:], default=0.0)


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


PREPARED: dict[tuple[int, int], Size] = {}  # at most one size; its tests run in a row and share compiled losses


def prepare(num_views: int, width: int, compiling: bool) -> Size:
    free_memory()
    torch.manual_seed(0)
    settle_heap()
    x = torch.randn(num_views // 2, width, device=DEVICE)
    # Similar views, for a loss of about 0.1 to 1, as in training.
    z1, z2 = ((x + 0.5 * torch.randn_like(x)).requires_grad_() for _ in range(2))
    with warnings.catch_warnings():  # from imports of other packages, and from the compiler
        warnings.simplefilter("ignore")
        size = Size(
            z1,
            z2,
            *(contenders(num_views, DEVICE, compiling=compiling) if WITH_ALTERNATIVES else fastsimclr_losses(DEVICE)),
        )
        for name, contender in list(size.contenders.items()):
            try:
                size.run(name, STEP)
                size.peak_mib[name] = peak_mib(lambda name=name: size.run(name, STEP))  # type: ignore[misc]
            except Exception as error:
                if contender.is_fastsimclr and not isinstance(error, torch.OutOfMemoryError):
                    raise
                size.missing[name] = error_line(error)
                del size.contenders[name]
                free_memory()
    size.expected = size.run("dense" if "dense" in size.contenders else "tiled", STEP)
    if not WITH_ALTERNATIVES:
        fastest = next(iter(size.contenders)).partition(",")[0]
        size.contenders = {name: each for name, each in size.contenders.items() if name.partition(",")[0] == fastest}
    return size


def target_verdicts(timing: Timing, size: Size, num_views: int, width: int) -> list[str]:
    """Return the verdicts on the targets of this size."""
    first = next(iter(size.contenders))
    figures = {"ms": timing.milliseconds[first].median, "peak MiB": size.peak_mib[first]}
    figures |= {FASTER_THAN + name: ratio.median for name, ratio in timing.speedup.items()}
    # Computed from the ratios of the rounds, which a slow second hardly changes.
    figures[OVER_PRODUCTS] = 2 * MATRIX**3 / (4 * num_views**2 * width) / timing.speedup[MATMUL].median
    by_size = next((each for device, each in TARGETS.items() if device in DEVICE_NAME), {})
    targets = by_size.get((num_views, width), {})
    return [verdict(what, figures[what], **bound) for what, bound in targets.items() if what in figures]


@pytest.mark.filterwarnings("default")  # warnings of other packages are not errors
@pytest.mark.parametrize(
    ("num_views", "width", "part"),
    [pytest.param(*size, part, id=f"{size[0]}-{size[1]}-{part}") for size in sizes() for part in (STEP, FORWARD)],
)
def test_nt_xent(suite: Suite, num_views: int, width: int, part: str) -> None:
    suite.benchmark.group = f"NT-Xent {part}"
    if (num_views, width) not in PREPARED:
        PREPARED.clear()
        PREPARED[num_views, width] = prepare(num_views, width, suite.may_compile())
    size = PREPARED[num_views, width]
    steps = {name: functools.partial(size.run, name, part) for name in size.contenders}
    a, b = (torch.randn(MATRIX, MATRIX, device=DEVICE, dtype=MATRIX_DTYPE) for _ in range(2))
    product = torch.empty_like(a)
    timing = suite.interleave(
        {**steps, MATMUL: lambda: torch.mm(a, b, out=product)},
        sizes={"views": num_views, "width": width},
        rounds=2 if SMALL else 15,
        repeats=min(20, max(1, 81920 // num_views)) if ON_GPU else 1,
    )
    checks, notes = {}, {}
    for name, contender in size.contenders.items():
        loss, gradients = size.errors(steps[name]())
        if contender.bound:
            Check("relative error of the gradients", gradients, contender.bound[1])
            checks[name] = Check("relative error of the loss", loss, contender.bound[0])
        else:
            gradients_error = f", gradients {gradients:.1g}" if part == STEP else ""
            notes[name] = f"lower precision; relative error against float32: loss {loss:.1g}{gradients_error}"
    _, *others = size.contenders
    task = f"NT-Xent {STEP}, {num_views} views of width {width}"
    suite.record(
        peak_mib=size.peak_mib if part == STEP else {},
        checks=checks,
        missing=size.missing,
        notes=notes,
        variants=[name for name in others if size.contenders[name].is_fastsimclr],
        references=[MATMUL],
        inexact=[name for name in others if size.contenders[name].bound is None],
        readme_task=task if (num_views, width, part) == (*README_SIZE, STEP) else "",
    )
    if part == STEP:
        suite.record_targets(*target_verdicts(timing, size, num_views, width))
