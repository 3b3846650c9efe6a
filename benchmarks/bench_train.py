"""Whole training steps: ours, lightly's example loop on torchvision's model and the same recipe, ours without a loader.

    python -m pytest benchmarks/bench_train.py --benchmark-json=benchmarks/results/train-DEVICE.json

ResNet-18 on CIFAR-10 of ../shared/data (else the digits) at batch 256, with both stems: ImageNet's, as lightly's
example has it, and the paper's for small images. Ours is what `python -m fastsimclr.train` runs at its defaults: bf16
where the CPU has it, channels-last, images kept decoded, both views through the model in one batch. So that one sees
what is due to what, beside it: ours in float32, and lightly's loop under bf16 autocast and channels-last. All have
lightly's optimizer, SGD of lr 0.06. The ceiling is ours on one batch of views made before. See train_contenders.py.

A call is a whole epoch of a few steps, so that no worker makes views for one contender while another is timed; times
are of a call. lightly's workers stay from one epoch to the next.

After timing all get the weights that ours ended with and the same views, and their losses are compared with the dense
loss of torchvision's model in float32. Batch normalisation is over both views of a batch in ours, and over each by
itself in lightly's loop: so it is in the loss that each is compared with. Peak memory is what torch's allocator holds
at most in a step, without the loader; lightly's workers hold more in processes of their own. On a GPU further:
ResNet-50 at 224² against its ceiling, CIFAR-10's epoch, and the loss's part of a step at batch 4096.

test_large_batch: a step of batch 4096 in micro-batches of 256, with our loss and with the dense one. Each runs again in
a process that may take no more than the mean of the two peaks: ours has to end there, the other must not.
"""

import gc
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.images import photographs, small_images
from benchmarks.interleaved import Check, Timing, describe, interleave
from benchmarks.memory import peak_mib
from benchmarks.sizes import SMALL
from benchmarks.train_contenders import (
    CORES,
    DEVICE,
    DEVICE_NAME,
    Contender,
    fits,
    large_step,
    lightly_loader,
    lightly_loop,
    open_small_views,
    ours,
    simclr,
    small_views,
    views_of,
    with_plain_convolutions,
)
from fastsimclr import Views
from fastsimclr.data import open_views
from fastsimclr.loss import nt_xent
from fastsimclr.malloc import keep_freed_memory
from fastsimclr.precision import choose_precision

ON_GPU = DEVICE.type == "cuda"
TEMPERATURE = 0.5
OURS, OURS_FP32, CEILING = "fastsimclr", "fastsimclr, float32", "fastsimclr, no loader (ceiling)"
LIGHTLY, LIGHTLY_TUNED = "lightly's loop", "lightly's loop, bf16, channels-last"
LARGE_OURS, LARGE_DENSE = "fastsimclr", "fastsimclr, dense loss"
FP32_BOUND = 1e-3
# bf16 rounds each projection by some 2 %, and the mean over 512 views averages most of it: measured 4e-5. Over the 8
# views of a small batch it does not: 0.008.
BF16_BOUND = 1e-1 if SMALL else 5e-3
BATCH = 4 if SMALL else 256
# Steps of a call, rounds and untimed rounds: of the small stem a step takes seconds on a CPU.
CASES = {"imagenet": (1, 2, 0) if SMALL else (4, 5, 1), "small": (1, 2, 0) if SMALL else (2, 3, 0)}
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
pytestmark = pytest.mark.filterwarnings("default")  # shown: other packages' are no reason to stop


def target(what: str, got: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """One line: what we mean to reach, and whether we do."""
    if at_most is not None:
        return f"{what} at most {at_most:g}: {'met' if got <= at_most else 'MISSED'} ({got:.3g})"
    assert at_least is not None
    return f"{what} at least {at_least:g}: {'met' if got >= at_least else 'MISSED'} ({got:.3g})"


def time_epochs(
    benchmark: BenchmarkFixture, contenders: Mapping[str, Contender], rounds: int, warmup_rounds: int
) -> Timing:
    gc.collect()
    keep_freed_memory()  # as fastsimclr.train does; so the rivals have that advantage, too
    timing = interleave(
        benchmark,
        {name: contender.epoch for name, contender in contenders.items()},
        rounds=rounds,
        warmup_rounds=warmup_rounds,
        synchronize=torch.cuda.synchronize if ON_GPU else lambda: None,
    )
    for name, contender in contenders.items():
        assert np.isfinite(contender.mean_loss), f"{name}: its loss became {contender.mean_loss}"
    return timing


def loss_checks(contenders: Mapping[str, Contender], stem: str, views: Sequence[Tensor]) -> dict[str, Check]:
    """Every contender's loss of the same views and weights, against the dense loss of the model in float32."""
    state = {name: each.clone() for name, each in next(iter(contenders.values())).model.state_dict().items()}
    plain = with_plain_convolutions(simclr("resnet18", stem, views[0].shape[-1]))
    plain.load_state_dict(state)
    with torch.no_grad():
        apart = [plain(view) for view in views]
        together = plain(torch.cat(list(views))).chunk(2)
        expected = {
            kind: float(nt_xent(z[0], z[1], TEMPERATURE, backend="reference"))
            for kind, z in ((False, apart), (True, together))
        }
    checks = {}
    for name, contender in contenders.items():
        contender.model.load_state_dict(state)
        reference = expected[contender.together]
        error = abs(contender.loss(views) - reference) / reference
        half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(contender.dtype)
        what = f"loss, relative, {half} to float32" if half else "loss, relative"
        checks[name] = Check(what, error, BF16_BOUND if half else FP32_BOUND)
    return checks


def table(title: str, timing: Timing, images: int, peaks: Mapping[str, float], remarks: Sequence[str]) -> str:
    lines = [f"{title}, {DEVICE_NAME}, {CORES} cores; {timing.rounds} rounds, median (quartiles)"]
    for name, spread in timing.milliseconds.items():
        ratio = f"{timing.speedup[name]} x" if name in timing.speedup else ""
        peak = f"{peaks[name]:7.0f} MiB" if name in peaks else ""
        lines.append(f"  {name:36} {1e3 * images / spread.median:8,.0f} images/s {ratio:>24} {peak}")
    return "\n".join([*lines, *(f"  {remark}" for remark in remarks)])


@pytest.mark.parametrize("stem", list(CASES))
@pytest.mark.benchmark(group="training steps, ResNet-18 at 32²")
def test_step(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], stem: str) -> None:
    steps, rounds, warmup_rounds = CASES[stem]
    recipe = small_views()
    source, images_from = small_images(steps * BATCH)
    start = simclr("resnet18", stem, recipe.image_size)
    auto = choose_precision("auto", DEVICE)

    loaders = {precision: open_small_views(source, recipe, BATCH, precision) for precision in ("auto", "fp32")}
    made = [view.clone() for view in next(iter(loaders["fp32"])).views]  # (BATCH, 3, 32, 32) float32
    in_our_dtype = [view.to(auto.view_dtype) for view in made]
    missing: dict[str, str] = {}
    contenders = {OURS: ours(start, views_of(loaders["auto"]), TEMPERATURE, "auto")}
    if auto.autocast:
        contenders[OURS_FP32] = ours(start, views_of(loaders["fp32"]), TEMPERATURE, "fp32")
    else:
        missing[OURS_FP32] = f"it is what ours is here: {auto.why}"
    contenders[CEILING] = ours(start, lambda: itertools.repeat(in_our_dtype, steps), TEMPERATURE, "auto")
    try:
        loader = lightly_loader(source, recipe, BATCH)
        contenders[LIGHTLY] = lightly_loop(start, loader, TEMPERATURE, tuned=False)
        contenders[LIGHTLY_TUNED] = lightly_loop(start, loader, TEMPERATURE, tuned=True)
    except ImportError as error:
        missing |= dict.fromkeys((LIGHTLY, LIGHTLY_TUNED), str(error))

    timing = time_epochs(benchmark, contenders, rounds, warmup_rounds)
    checks = loss_checks(contenders, stem, made)
    peaks = {}
    for name, contender in contenders.items():
        views = [view.to(contender.dtype) for view in made] if contender.together else made
        peaks[name] = peak_mib(lambda contender=contender, views=views: contender.update(views))  # type: ignore[misc]

    targets = []
    if LIGHTLY in contenders and not SMALL:
        if not ON_GPU:
            targets.append(target("times faster than lightly's loop", timing.speedup[LIGHTLY].median, at_least=1.5))
        targets.append(target("peak over that of lightly's loop", peaks[OURS] / peaks[LIGHTLY], at_most=1))
    notes = dict.fromkeys((OURS, CEILING), auto.why)
    notes |= {name: f"{CORES} workers" for name in (LIGHTLY, LIGHTLY_TUNED) if name in contenders}
    describe(
        benchmark,
        device=DEVICE_NAME,
        sizes={"stem": stem, "batch_size": BATCH, "steps": steps},
        images=dict.fromkeys(contenders, steps * BATCH),
        peak_mib=peaks,
        checks=checks,
        missing=missing,
        notes=notes,
        ours=[name for name in (OURS_FP32,) if name in contenders],
        yardsticks=[CEILING],
    )
    benchmark.extra_info.update(images_from=images_from, targets=targets)
    remarks = [f"loss off float32's, relative: {name} {check.error:.1g}" for name, check in checks.items()]
    with capsys.disabled():
        title = f"ResNet-18, stem {stem}, batch {BATCH} at 32² ({images_from})"
        print("\n" + table(title, timing, steps * BATCH, peaks, [*remarks, *(f"target, {each}" for each in targets)]))
    for each in loaders.values():
        each.close()


@pytest.mark.benchmark(group="a large batch in micro-batches, ResNet-18 at 32²")
def test_large_batch(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    batch, micro = (64, 16) if SMALL else (4096, 256)
    steps = {LARGE_OURS: large_step(batch, micro, "ours"), LARGE_DENSE: large_step(batch, micro, "dense")}
    timing = interleave(benchmark, steps, rounds=1, warmup_rounds=0)
    ours_loss, dense_loss = (step() for step in steps.values())
    check = Check("loss, relative", abs(ours_loss - dense_loss) / dense_loss, FP32_BOUND)
    peaks = {name: peak_mib(step) for name, step in steps.items()}

    # At small sizes the gradients of the model outweigh any loss: then a limited process is only shown to run.
    limit = (peaks[LARGE_OURS] + peaks[LARGE_DENSE]) / 2 + (64 if SMALL else 0)
    del steps
    gc.collect()
    fitting = {}
    for name, loss in ((LARGE_OURS, "ours"), (LARGE_DENSE, "dense"))[: 1 if SMALL else 2]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            fitting[name] = process.submit(fits, batch, micro, loss, limit).result()

    fates = {
        name: f"{'fits' if fitting[name] else 'is out of memory'} where it gets {limit:.0f} MiB" for name in fitting
    }
    describe(
        benchmark,
        device=DEVICE_NAME,
        sizes={"batch_size": batch, "micro_batch_size": micro},
        images=dict.fromkeys(peaks, batch),
        peak_mib=peaks,
        checks={LARGE_DENSE: check},
        notes=fates,
        headline=False,
    )
    benchmark.extra_info.update(limit_mib=limit, fits_within_limit=fitting)
    with capsys.disabled():
        title = f"A step of batch {batch} × 2 views in micro-batches of {micro}, ResNet-18 at 32²"
        print("\n" + table(title, timing, batch, peaks, [f"{name}: {fate}" for name, fate in fates.items()]))
    assert fitting[LARGE_OURS]
    assert not fitting.get(LARGE_DENSE, False)


def write_photographs(folder: Path, count: int) -> str:
    """`count` files, few photographs again and again; says which."""
    files, images_from = photographs(300)
    for number, file in zip(range(count), itertools.cycle(files), strict=False):
        (folder / f"{number:05}.jpg").write_bytes(file)
    return images_from


def against_ceiling(
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
    title: str,
    contenders: Mapping[str, Contender],
    images: int,
    sizes: Mapping[str, object],
    targets: Callable[[Timing], list[str]],
) -> None:
    """Time ours and its ceiling, and record the targets that hold for them."""
    timing = time_epochs(benchmark, contenders, rounds=2 if SMALL else 5, warmup_rounds=1)
    describe(
        benchmark,
        device=DEVICE_NAME,
        sizes=sizes,
        images=dict.fromkeys(contenders, images),
        notes={OURS: choose_precision("auto", DEVICE).why},
        yardsticks=[CEILING],
    )
    verdicts = [] if SMALL else targets(timing)
    benchmark.extra_info.update(targets=verdicts)
    with capsys.disabled():
        print("\n" + table(title, timing, images, {}, [f"target, {verdict}" for verdict in verdicts]))


@needs_gpu
@pytest.mark.benchmark(group="training, ResNet-50 at 224²")
def test_photographs(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """ResNet-50 on photographs that DALI decodes, against the same loop without a loader."""
    pytest.importorskip("nvidia.dali")
    batch, steps = (32, 2) if SMALL else (512, 8)
    images = batch * steps
    images_from = write_photographs(tmp_path, images)
    loader = open_views(
        str(tmp_path),
        Views(),
        batch,
        backend="dali",
        device=DEVICE,
        drop_last=True,
        dtype=choose_precision("auto", DEVICE).view_dtype,
    )
    start = simclr("resnet50", "imagenet", 224)
    torch.backends.cudnn.benchmark = True  # as fastsimclr.train sets it
    made = [view.clone() for view in next(iter(loader)).views]
    contenders = {
        OURS: ours(start, views_of(loader), 0.1, "auto"),
        CEILING: ours(start, lambda: itertools.repeat(made, steps), 0.1, "auto"),
    }
    against_ceiling(
        benchmark,
        capsys,
        f"ResNet-50, batch {batch} at 224² ({images_from}), {os.cpu_count()} cores",
        contenders,
        images,
        {"encoder": "resnet50", "image_size": 224, "batch_size": batch, "steps": steps},
        lambda timing: [
            target("part of the ceiling", timing.speedup[CEILING].median, at_least=0.95),
            target("source images/s", 1e3 * images / timing.milliseconds[OURS].median, at_least=1500),
        ],
    )
    loader.close()


@needs_gpu
@pytest.mark.benchmark(group="training, CIFAR-10's epoch")
def test_cifar10_epoch(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole epoch of ResNet-18 with the stem for small images."""
    batch = 32 if SMALL else 512
    source, images_from = small_images(2 * batch if SMALL else None)
    recipe = small_views()
    loader = open_small_views(source, recipe, batch, "auto")
    start = simclr("resnet18", "small", recipe.image_size)
    torch.backends.cudnn.benchmark = True
    made = [view.clone() for view in next(iter(loader)).views]
    contenders = {
        OURS: ours(start, views_of(loader), TEMPERATURE, "auto"),
        CEILING: ours(start, lambda: itertools.repeat(made, len(loader)), TEMPERATURE, "auto"),
    }
    against_ceiling(
        benchmark,
        capsys,
        f"ResNet-18, an epoch of {images_from} at batch {batch}",
        contenders,
        len(loader) * batch,
        {"encoder": "resnet18", "image_size": 32, "batch_size": batch, "steps": len(loader)},
        lambda timing: [
            target(
                "seconds an epoch", timing.milliseconds[OURS].median / 1e3 * 50_000 / (len(loader) * batch), at_most=3
            )
        ],
    )
    loader.close()


@needs_gpu
@pytest.mark.benchmark(group="the loss in a step of batch 4096")
def test_loss_share(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """What part of a step of ResNet-50 the loss is: its forward and backward by itself over the whole step."""
    batch, micro, image_size = (64, 16, 64) if SMALL else (4096, 256, 224)
    start = simclr("resnet50", "imagenet", image_size)
    torch.backends.cudnn.benchmark = True
    dtype = choose_precision("auto", DEVICE).view_dtype
    views = [torch.randn(batch, 3, image_size, image_size, device=DEVICE, dtype=dtype) for _ in range(2)]
    step = ours(start, lambda: [views], 0.1, "auto", micro)
    z = [torch.randn(batch, 128, device=DEVICE, requires_grad=True) for _ in range(2)]

    def loss() -> None:
        torch.autograd.grad(nt_xent(z[0], z[1], 0.1, precision="highest"), z)

    timing = interleave(
        benchmark, {"step": step.epoch, "loss": loss}, rounds=5, warmup_rounds=1, synchronize=torch.cuda.synchronize
    )
    sizes = {"encoder": "resnet50", "image_size": image_size, "batch_size": batch, "micro_batch_size": micro}
    describe(benchmark, device=DEVICE_NAME, sizes=sizes, images={"step": batch}, yardsticks=["loss"], headline=False)
    verdicts = [] if SMALL else [target("loss / step", timing.speedup["loss"].median, at_most=0.01)]
    benchmark.extra_info.update(targets=verdicts)
    with capsys.disabled():
        print("\n" + "\n".join([f"The loss in a step of batch {batch}, {DEVICE_NAME}: {timing}", *verdicts]))
