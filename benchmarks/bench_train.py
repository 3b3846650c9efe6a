"""Whole training steps: fastsimclr, with and without a loader, and lightly's example loop with torchvision's model.

    python -m pytest benchmarks/bench_train.py --benchmark-json=benchmarks/results/train-DEVICE.json

ResNet-18 is trained on CIFAR-10 from ../shared/data (or else the digits) at batch size 256, with both stems.
"fastsimclr" is what `python -m fastsimclr.train` runs at its defaults. All contenders use the augmentation of the
preset cifar10, with bilinear interpolation, and lightly's optimizer, SGD with lr 0.06. The ceiling is fastsimclr on one
batch of precomputed views.

A call is a whole epoch of a few steps, so that no worker prepares views for one contender while another is timed. After
timing, all contenders get the final weights of fastsimclr and the same views, and their losses are compared with the
dense loss of torchvision's model in float32. BatchNorm runs over both views of a batch in fastsimclr and over each view
separately in lightly's loop; the loss that a contender is compared with does the same. Peak memory is that of a step,
without the loader.

test_large_batch runs a step of batch size 4096 in micro-batches of 256, with fastsimclr's loss and with the dense loss.
Both run again in a process whose memory is limited to the mean of the two peaks: the step with fastsimclr's loss must
fit, the other must not.
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
    fastsimclr_loop,
    fits_in_memory,
    large_step,
    lightly_loader,
    lightly_loop,
    open_small_views,
    simclr,
    small_views,
    view_batches,
    with_plain_convolutions,
)
from fastsimclr import Augmentation
from fastsimclr.data import ViewLoader, open_views
from fastsimclr.loss import nt_xent
from fastsimclr.malloc import keep_freed_memory
from fastsimclr.precision import choose_precision

TEMPERATURE = 0.5
OURS, OURS_FP32, CEILING = "fastsimclr", "fastsimclr, float32", "fastsimclr, no loader (ceiling)"
LIGHTLY, LIGHTLY_TUNED = "lightly loop", "lightly loop, bf16, channels-last"
LARGE_OURS, LARGE_DENSE = "fastsimclr", "fastsimclr, dense loss"
FP32_BOUND = 1e-3
# bf16 changes each projection by about 2 %; the mean over 512 views cancels most of it (measured 4e-5), the mean over
# the 8 views of a small batch does not (0.008).
BF16_BOUND = 1e-1 if SMALL else 5e-3
BATCH = 4 if SMALL else 256
# Steps per call, and rounds: with the small stem, a step takes seconds on a CPU.
CASES = {"imagenet": (1, 2) if SMALL else (4, 5), "small": (1, 2) if SMALL else (2, 3)}
# Warnings of other packages are not errors.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def training_settings() -> None:
    """Apply the settings of fastsimclr.train, for all contenders."""
    gc.collect()
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True


def loss_checks(contenders: Mapping[str, Contender], stem: str, views: Sequence[Tensor]) -> dict[str, Check]:
    """Check each contender's loss, for the same views and weights, against the dense loss of the float32 model."""
    state = {name: each.clone() for name, each in next(iter(contenders.values())).model.state_dict().items()}
    plain = with_plain_convolutions(simclr("resnet18", stem, views[0].shape[-1]))
    plain.load_state_dict(state)
    with torch.no_grad():
        projections = {False: [plain(view) for view in views], True: plain(torch.cat(list(views))).chunk(2)}
        expected = {
            joint: float(nt_xent(z[0], z[1], TEMPERATURE, backend="reference")) for joint, z in projections.items()
        }
    checks = {}
    for name, contender in contenders.items():
        contender.model.load_state_dict(state)
        reference = expected[contender.joint_batch_norm]
        error = abs(contender.loss(views) - reference) / reference
        half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(contender.dtype)
        what = "relative error of the loss" + (f", {half} against float32" if half else "")
        checks[name] = Check(what, error, BF16_BOUND if half else FP32_BOUND)
    return checks


@pytest.mark.parametrize("stem", list(CASES))
@pytest.mark.benchmark(group="training step of ResNet-18 at 32x32")
def test_step(suite: Suite, stem: str) -> None:
    steps, rounds = CASES[stem]
    recipe = small_views()
    source, images_from = small_images(steps * BATCH)
    start = simclr("resnet18", stem, recipe.image_size)
    auto = choose_precision("auto", DEVICE)
    loaders = {precision: open_small_views(source, recipe, BATCH, precision) for precision in ("auto", "fp32")}
    precomputed = [view.clone() for view in next(iter(loaders["fp32"])).views]  # (BATCH, 3, 32, 32) float32
    in_view_dtype = [view.to(auto.view_dtype) for view in precomputed]
    missing: dict[str, str] = {}
    contenders = {OURS: fastsimclr_loop(start, view_batches(loaders["auto"]), TEMPERATURE, "auto")}
    if auto.autocast:
        contenders[OURS_FP32] = fastsimclr_loop(start, view_batches(loaders["fp32"]), TEMPERATURE, "fp32")
    else:
        missing[OURS_FP32] = f"same as {OURS} here: {auto.why}"
    contenders[CEILING] = fastsimclr_loop(start, lambda: itertools.repeat(in_view_dtype, steps), TEMPERATURE, "auto")
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
    checks = loss_checks(contenders, stem, precomputed)
    peaks = {}
    for name, contender in contenders.items():
        views = [view.to(contender.dtype) for view in precomputed] if contender.joint_batch_norm else precomputed
        peaks[name] = peak_mib(lambda contender=contender, views=views: contender.update(views))  # type: ignore[misc]
    notes = dict.fromkeys((OURS, CEILING), auto.why)
    suite.record(
        images=dict.fromkeys(contenders, steps * BATCH),
        peak_mib=peaks,
        checks=checks,
        missing=missing,
        notes=notes | {name: f"{CORES} workers" for name in (LIGHTLY, LIGHTLY_TUNED) if name in contenders},
        variants=[name for name in (OURS_FP32,) if name in contenders],
        references=[CEILING],
        # At image size 32, `--model.stem auto` selects the small stem.
        readme_task=f"training step of ResNet-18 at 32x32, batch size {BATCH}" if stem == "small" else "",
        images_from=images_from,
    )
    if LIGHTLY in contenders:
        suite.record_targets(verdict("peak memory relative to lightly loop", peaks[OURS] / peaks[LIGHTLY], at_most=1))
        if not ON_GPU:
            suite.record_targets(
                verdict("times faster than lightly loop", timing.speedup[LIGHTLY].median, at_least=1.5)
            )
    for each in loaders.values():
        each.close()


@pytest.mark.benchmark(group="large batch in micro-batches, ResNet-18 at 32x32")
def test_large_batch(suite: Suite) -> None:
    batch, micro = (64, 16) if SMALL else (4096, 256)
    steps = {LARGE_OURS: large_step(batch, micro, "ours"), LARGE_DENSE: large_step(batch, micro, "dense")}
    suite.interleave(steps, sizes={"batch_size": batch, "micro_batch_size": micro}, rounds=1 if SMALL else 3)
    our_loss, dense_loss = (step() for step in steps.values())
    check = Check("relative error of the loss", abs(our_loss - dense_loss) / dense_loss, FP32_BOUND)
    peaks = {name: peak_mib(step) for name, step in steps.items()}

    # At small sizes, the gradients of the model need more memory than any loss: only check that the process runs.
    limit = (peaks[LARGE_OURS] + peaks[LARGE_DENSE]) / 2 + (64 if SMALL else 0)
    del steps
    gc.collect()
    fit_in_limit = {}
    for name, loss in ((LARGE_OURS, "ours"), (LARGE_DENSE, "dense"))[: 1 if SMALL else 2]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            fit_in_limit[name] = process.submit(fits_in_memory, batch, micro, loss, limit).result()
    suite.record(
        images=dict.fromkeys(peaks, batch),
        peak_mib=peaks,
        checks={LARGE_DENSE: check},
        notes={
            name: f"{'fits into' if fit else 'runs out of memory with'} {limit:.0f} MiB"
            for name, fit in fit_in_limit.items()
        },
    )
    assert fit_in_limit[LARGE_OURS]
    assert not fit_in_limit.get(LARGE_DENSE, False)


def against_ceiling(
    suite: Suite, loader: ViewLoader, encoder: tuple[str, str], recipe: Augmentation, temperature: float
) -> tuple[float, float]:
    """Time fastsimclr and its ceiling; return its images per second, and their fraction of the ceiling's."""
    steps = len(loader)
    start = simclr(*encoder, recipe.image_size)
    precomputed = [view.clone() for view in next(iter(loader)).views]
    contenders = {
        OURS: fastsimclr_loop(start, view_batches(loader), temperature, "auto"),
        CEILING: fastsimclr_loop(start, lambda: itertools.repeat(precomputed, steps), temperature, "auto"),
    }
    sizes = {"encoder": encoder[0], "image_size": recipe.image_size, "batch_size": len(precomputed[0]), "steps": steps}
    epochs = {name: contender.epoch for name, contender in contenders.items()}
    timing = suite.interleave(epochs, sizes=sizes, rounds=2 if SMALL else 5)
    images, why = steps * len(precomputed[0]), choose_precision("auto", DEVICE).why
    suite.record(images=dict.fromkeys(contenders, images), notes={OURS: why}, references=[CEILING])
    loader.close()
    return 1e3 * images / timing.milliseconds[OURS].median, timing.speedup[CEILING].median


@pytest.mark.gpu
@pytest.mark.benchmark(group="training of ResNet-50 at 224x224")
def test_photographs(suite: Suite, tmp_path: Path) -> None:
    """ResNet-50 on photos decoded by DALI, against the same loop without a loader."""
    pytest.importorskip("nvidia.dali")
    batch, steps = (32, 2) if SMALL else (512, 8)
    files, _ = photographs(300)
    for number, file in zip(range(batch * steps), itertools.cycle(files), strict=False):
        (tmp_path / f"{number:05}.jpg").write_bytes(file)
    dtype = choose_precision("auto", DEVICE).view_dtype
    loader = open_views(
        str(tmp_path), Augmentation(), batch, backend="dali", device=DEVICE, drop_last=True, dtype=dtype
    )
    rate, fraction = against_ceiling(suite, loader, ("resnet50", "imagenet"), Augmentation(), 0.1)
    suite.record_targets(
        verdict("fraction of the ceiling", fraction, at_least=0.95), verdict("source images/s", rate, at_least=1500)
    )


@pytest.mark.gpu
@pytest.mark.benchmark(group="training epoch on CIFAR-10")
def test_cifar10_epoch(suite: Suite) -> None:
    """A whole epoch of ResNet-18 with the small stem."""
    batch = 32 if SMALL else 512
    source, _ = small_images(2 * batch if SMALL else None)
    loader = open_small_views(source, small_views(), batch, "auto")
    rate, _ = against_ceiling(suite, loader, ("resnet18", "small"), small_views(), TEMPERATURE)
    suite.record_targets(verdict("seconds per epoch", 50_000 / rate, at_most=3))


@pytest.mark.gpu
@pytest.mark.benchmark(group="share of the loss in a step of batch size 4096")
def test_loss_share(suite: Suite) -> None:
    """Share of the loss in a training step of ResNet-50: forward and backward of the loss over the whole step."""
    batch, micro, image_size = (64, 16, 64) if SMALL else (4096, 256, 224)
    dtype = choose_precision("auto", DEVICE).view_dtype
    views = [torch.randn(batch, 3, image_size, image_size, device=DEVICE, dtype=dtype) for _ in range(2)]
    step = fastsimclr_loop(simclr("resnet50", "imagenet", image_size), lambda: [views], 0.1, "auto", micro)
    z = [torch.randn(batch, 128, device=DEVICE, requires_grad=True) for _ in range(2)]

    def loss() -> None:
        torch.autograd.grad(nt_xent(z[0], z[1], 0.1, precision="highest"), z)

    sizes = {"encoder": "resnet50", "image_size": image_size, "batch_size": batch, "micro_batch_size": micro}
    timing = suite.interleave({"step": step.epoch, "loss": loss}, sizes=sizes, rounds=5)
    suite.record(images={"step": batch}, references=["loss"])
    suite.record_targets(verdict("loss / step", timing.speedup["loss"].median, at_most=0.01))
