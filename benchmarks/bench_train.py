"""Whole training steps: ours, lightly's example loop on torchvision's model and the same recipe, ours without a loader.

    python -m pytest benchmarks/bench_train.py --benchmark-json=benchmarks/results/train-DEVICE.json

ResNet-18 on CIFAR-10 of ../shared/data (else the digits) at batch 256, with both stems. Ours is what
`python -m fastsimclr.train` runs at its defaults. All have lightly's optimizer, SGD of lr 0.06. The ceiling is ours on
one batch of views made before.

A call is a whole epoch of a few steps, so that no worker makes views for one contender while another is timed. After
timing all get the weights that ours ended with and the same views, and their losses are compared with the dense loss of
torchvision's model in float32. Batch normalization is over both views of a batch in ours, and over each separately in
lightly's loop: so it is in the loss that each is compared with. Peak memory is of a step, without the loader.

test_large_batch: a step of batch 4096 in micro-batches of 256, with our loss and with the dense one. Each runs again in
a process that may take no more than the mean of the two peaks: ours has to end there, the other must not.
"""

import gc
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.images import photographs, small_images
from benchmarks.memory import peak_mib
from benchmarks.suite import CORES, DEVICE, ON_GPU, SMALL, Check, Suite, verdict
from benchmarks.train_contenders import (
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
from fastsimclr import Augmentation
from fastsimclr.data import ViewLoader, open_views
from fastsimclr.loss import nt_xent
from fastsimclr.malloc import keep_freed_memory
from fastsimclr.precision import choose_precision

TEMPERATURE = 0.5
OURS, OURS_FP32, CEILING = "fastsimclr", "fastsimclr, float32", "fastsimclr, no loader (ceiling)"
LIGHTLY, LIGHTLY_TUNED = "lightly's loop", "lightly's loop, bf16, channels-last"
LARGE_OURS, LARGE_DENSE = "fastsimclr", "fastsimclr, dense loss"
FP32_BOUND = 1e-3
# bf16 rounds each projection by some 2 %, and the mean over 512 views averages most of it: measured 4e-5. Over the 8
# views of a small batch it does not: 0.008.
BF16_BOUND = 1e-1 if SMALL else 5e-3
BATCH = 4 if SMALL else 256
# Steps of a call and rounds: with the small stem a step takes seconds on a CPU.
CASES = {"imagenet": (1, 2) if SMALL else (4, 5), "small": (1, 2) if SMALL else (2, 3)}
# Other packages' warnings are no reason to stop.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def as_training() -> None:
    """What fastsimclr.train sets; so the rivals have that advantage, too."""
    gc.collect()
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True


def loss_checks(contenders: Mapping[str, Contender], stem: str, views: Sequence[Tensor]) -> dict[str, Check]:
    """Every contender's loss of the same views and weights, against the dense loss of the model in float32."""
    state = {name: each.clone() for name, each in next(iter(contenders.values())).model.state_dict().items()}
    plain = with_plain_convolutions(simclr("resnet18", stem, views[0].shape[-1]))
    plain.load_state_dict(state)
    with torch.no_grad():
        projections = {False: [plain(view) for view in views], True: plain(torch.cat(list(views))).chunk(2)}
        expected = {
            together: float(nt_xent(z[0], z[1], TEMPERATURE, backend="reference"))
            for together, z in projections.items()
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


@pytest.mark.parametrize("stem", list(CASES))
@pytest.mark.benchmark(group="training steps, ResNet-18 at 32²")
def test_step(suite: Suite, stem: str) -> None:
    steps, rounds = CASES[stem]
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
        if auto.autocast == torch.bfloat16:
            contenders[LIGHTLY_TUNED] = lightly_loop(start, loader, TEMPERATURE, tuned=True)
        else:
            missing[LIGHTLY_TUNED] = auto.why
    except ImportError as error:
        missing |= dict.fromkeys((LIGHTLY, LIGHTLY_TUNED), str(error))

    timing = suite.interleave(
        {name: contender.epoch for name, contender in contenders.items()},
        sizes={"stem": stem, "batch_size": BATCH, "steps": steps},
        rounds=rounds,
    )
    checks = loss_checks(contenders, stem, made)
    peaks = {}
    for name, contender in contenders.items():
        views = [view.to(contender.dtype) for view in made] if contender.together else made
        peaks[name] = peak_mib(lambda contender=contender, views=views: contender.update(views))  # type: ignore[misc]
    notes = dict.fromkeys((OURS, CEILING), auto.why)
    suite.record(
        images=dict.fromkeys(contenders, steps * BATCH),
        peak_mib=peaks,
        checks=checks,
        missing=missing,
        notes=notes | {name: f"{CORES} workers" for name in (LIGHTLY, LIGHTLY_TUNED) if name in contenders},
        ours=[name for name in (OURS_FP32,) if name in contenders],
        yardsticks=[CEILING],
        images_from=images_from,
    )
    if LIGHTLY in contenders:
        suite.judge(verdict("peak over that of lightly's loop", peaks[OURS] / peaks[LIGHTLY], at_most=1))
        if not ON_GPU:
            suite.judge(verdict("times faster than lightly's loop", timing.speedup[LIGHTLY].median, at_least=1.5))
    for each in loaders.values():
        each.close()


@pytest.mark.benchmark(group="a large batch in micro-batches, ResNet-18 at 32²")
def test_large_batch(suite: Suite) -> None:
    batch, micro = (64, 16) if SMALL else (4096, 256)
    steps = {LARGE_OURS: large_step(batch, micro, "ours"), LARGE_DENSE: large_step(batch, micro, "dense")}
    suite.interleave(steps, sizes={"batch_size": batch, "micro_batch_size": micro}, rounds=1 if SMALL else 3)
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
    suite.record(
        images=dict.fromkeys(peaks, batch),
        peak_mib=peaks,
        checks={LARGE_DENSE: check},
        notes={
            name: f"{'fits' if fit else 'is out of memory'} where it gets {limit:.0f} MiB"
            for name, fit in fitting.items()
        },
        headline=False,
    )
    assert fitting[LARGE_OURS]
    assert not fitting.get(LARGE_DENSE, False)


def against_ceiling(
    suite: Suite, loader: ViewLoader, encoder: tuple[str, str], recipe: Augmentation, temperature: float
) -> tuple[float, float]:
    """Time ours and its ceiling; returns our images a second, and what part of the ceiling that is."""
    steps = len(loader)
    start = simclr(*encoder, recipe.image_size)
    made = [view.clone() for view in next(iter(loader)).views]
    contenders = {
        OURS: ours(start, views_of(loader), temperature, "auto"),
        CEILING: ours(start, lambda: itertools.repeat(made, steps), temperature, "auto"),
    }
    sizes = {"encoder": encoder[0], "image_size": recipe.image_size, "batch_size": len(made[0]), "steps": steps}
    epochs = {name: contender.epoch for name, contender in contenders.items()}
    timing = suite.interleave(epochs, sizes=sizes, rounds=2 if SMALL else 5)
    images, why = steps * len(made[0]), choose_precision("auto", DEVICE).why
    suite.record(images=dict.fromkeys(contenders, images), notes={OURS: why}, yardsticks=[CEILING])
    loader.close()
    return 1e3 * images / timing.milliseconds[OURS].median, timing.speedup[CEILING].median


@pytest.mark.gpu
@pytest.mark.benchmark(group="training, ResNet-50 at 224²")
def test_photographs(suite: Suite, tmp_path: Path) -> None:
    """ResNet-50 on photographs that DALI decodes, against the same loop without a loader."""
    pytest.importorskip("nvidia.dali")
    batch, steps = (32, 2) if SMALL else (512, 8)
    files, _ = photographs(300)
    for number, file in zip(range(batch * steps), itertools.cycle(files), strict=False):
        (tmp_path / f"{number:05}.jpg").write_bytes(file)
    dtype = choose_precision("auto", DEVICE).view_dtype
    loader = open_views(
        str(tmp_path), Augmentation(), batch, backend="dali", device=DEVICE, drop_last=True, dtype=dtype
    )
    rate, part = against_ceiling(suite, loader, ("resnet50", "imagenet"), Augmentation(), 0.1)
    suite.judge(verdict("part of the ceiling", part, at_least=0.95), verdict("source images/s", rate, at_least=1500))


@pytest.mark.gpu
@pytest.mark.benchmark(group="training, CIFAR-10's epoch")
def test_cifar10_epoch(suite: Suite) -> None:
    """A whole epoch of ResNet-18 with the stem for small images."""
    batch = 32 if SMALL else 512
    source, _ = small_images(2 * batch if SMALL else None)
    loader = open_small_views(source, small_views(), batch, "auto")
    rate, _ = against_ceiling(suite, loader, ("resnet18", "small"), small_views(), TEMPERATURE)
    suite.judge(verdict("seconds an epoch", 50_000 / rate, at_most=3))


@pytest.mark.gpu
@pytest.mark.benchmark(group="the loss in a step of batch 4096")
def test_loss_share(suite: Suite) -> None:
    """What part of a step of ResNet-50 the loss is: its forward and backward alone over the whole step."""
    batch, micro, image_size = (64, 16, 64) if SMALL else (4096, 256, 224)
    dtype = choose_precision("auto", DEVICE).view_dtype
    views = [torch.randn(batch, 3, image_size, image_size, device=DEVICE, dtype=dtype) for _ in range(2)]
    step = ours(simclr("resnet50", "imagenet", image_size), lambda: [views], 0.1, "auto", micro)
    z = [torch.randn(batch, 128, device=DEVICE, requires_grad=True) for _ in range(2)]

    def loss() -> None:
        torch.autograd.grad(nt_xent(z[0], z[1], 0.1, precision="highest"), z)

    sizes = {"encoder": "resnet50", "image_size": image_size, "batch_size": batch, "micro_batch_size": micro}
    timing = suite.interleave({"step": step.epoch, "loss": loss}, sizes=sizes, rounds=5)
    suite.record(images={"step": batch}, yardsticks=["loss"], headline=False)
    suite.judge(verdict("loss / step", timing.speedup["loss"].median, at_most=0.01))
