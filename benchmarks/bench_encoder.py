"""Forward and backward of the encoder and its projection head: channels-last or not, float32 or bf16, compiled or not.

    python -m pytest benchmarks/bench_encoder.py --benchmark-json=benchmarks/results/encoder-DEVICE.json

A fixed batch of views in memory, and a fixed gradient of the projections: no loader, no loss, no optimizer. The first
contender is what fastsimclr.train takes by itself where the hardware has bf16; on a CPU without it bf16 is emulated,
and slow. The model is compiled as `--compile true` does it; what that takes is not timed, and its warm-up is a call.
"torchvision's" is the same with plain nn.Conv2d everywhere, as torchvision's ResNet has it.

After timing, projections and gradients are compared with those of torchvision's in float32, by the norm of their
difference. The last scale of each residual branch, zero at first, is 0.2 here: else most layers would have no gradient
to compare. (At 1 a ResNet that is not trained is chaotic: bf16 then changes its gradients as much as other views do.)
"""

import gc
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.interleaved import Check, describe, interleave
from benchmarks.memory import peak_mib
from benchmarks.sizes import SMALL
from benchmarks.train_contenders import DEVICE, DEVICE_NAME, simclr, with_plain_convolutions
from fastsimclr.malloc import keep_freed_memory
from fastsimclr.precision import choose_precision

ON_GPU = DEVICE.type == "cuda"


@dataclass(frozen=True)
class Case:
    """views: how many go through at a time. bf16_bounds: largest relative error of projections and of gradients."""

    encoder: str
    stem: str
    image_size: int
    views: int
    rounds: int
    bf16_bounds: tuple[float, float]


# bf16 rounds each layer's output by up to 2^-9, and batch normalisation magnifies what is alike in few views: measured
# 0.02 to 0.03 in the projections of ResNet-18, 0.05 to 0.08 of ResNet-50. A ReLU whose input is that near to zero
# passes a gradient or does not, so gradients differ by the root of it: 0.17 and 0.45. Other gradients differ by 1.4.
RESNET18_BF16, RESNET50_BF16 = (0.05, 0.3), (0.15, 0.7)
FP32_BOUNDS = 1e-3, 5e-2  # by another order of sums; measured 4e-5 and 0.01, for the same reason
BRANCH_SCALE = 0.2
CASES = (
    (
        Case("resnet18", "small", 32, 8, 2, RESNET18_BF16),
        Case("resnet50", "imagenet", 32, 8, 2, RESNET50_BF16),
    )
    if SMALL
    else (
        Case("resnet18", "small", 32, 1024 if ON_GPU else 256, 10, RESNET18_BF16),
        Case("resnet50", "imagenet", 224, 256 if ON_GPU else 8, 7, RESNET50_BF16),
    )
)
SETUPS = {  # bf16, channels-last, compiled
    "bf16, channels-last": (True, True, False),
    "float32": (False, False, False),
    "float32, channels-last": (False, True, False),
    "bf16": (True, False, False),
    "bf16, channels-last, torch.compile": (True, True, True),
    "float32, channels-last, torch.compile": (False, True, True),
}
RIVALS = {
    "torchvision's, bf16, channels-last": (True, True, False),
    "torchvision's, float32": (False, False, False),
}
PLAIN = "torchvision's, float32"
OURS = next(iter(SETUPS))


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class Pass:
    """A contender: called, it puts the views through the model forward and backward. All have the same weights, views
    and gradient of the projections."""

    def __init__(self, case: Case, bf16: bool, channels_last: bool, compiled: bool, *, torchvisions: bool) -> None:
        self.bf16 = bf16
        self.model = simclr(case.encoder, case.stem, case.image_size)  # seeds what is drawn below, too
        if torchvisions:
            with_plain_convolutions(self.model)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
                nn.init.constant_(module.weight, BRANCH_SCALE)
        coarse = torch.randn(case.views, 3, 4, 4, device=DEVICE)  # as alike as images are; noise is all the same
        views = F.interpolate(coarse, size=case.image_size, mode="bicubic")
        self.dz = torch.randn(case.views, 128, device=DEVICE)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self.views = views.to(torch.bfloat16 if bf16 else torch.float32, memory_format=layout)
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model

    def __call__(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16):
            z: Tensor = self.forward(self.views)
        z.backward(self.dz.to(z.dtype))
        return z

    def results(self) -> tuple[Tensor, Tensor]:
        """Projections, and the gradients of all parameters in one vector."""
        z = self().detach().float()
        return z, torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def relative_errors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[float, ...]:
    return tuple(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


@pytest.mark.filterwarnings("default")  # shown: what the compiler has to say is no reason to stop
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.encoder)
@pytest.mark.benchmark(group="encoder, forward + backward")
def test_encoder(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], case: Case) -> None:
    gc.collect()
    keep_freed_memory()  # as fastsimclr.train does; so the rivals have that advantage, too
    torch.compiler.reset()
    torch.backends.cudnn.benchmark = True  # as fastsimclr.train sets it
    passes: dict[str, Pass] = {}
    missing: dict[str, str] = {}
    for name, setup in {**SETUPS, **RIVALS}.items():
        if SMALL and name.endswith("torch.compile"):
            missing[name] = "takes a minute to compile: not at small sizes"
            continue
        try:
            passes[name] = Pass(case, *setup, torchvisions=name in RIVALS)
            passes[name]()
        except Exception as error:
            if not name.endswith("torch.compile"):
                raise
            passes.pop(name, None)
            missing[name] = f"it does not compile here: {one_line(error)}"

    timing = interleave(
        benchmark,
        passes,
        rounds=case.rounds,
        warmup_rounds=0 if SMALL else 1,
        synchronize=torch.cuda.synchronize if ON_GPU else lambda: None,
    )
    expected = passes[PLAIN].results()
    checks, notes = {}, {}
    for name, each in passes.items():
        errors = relative_errors(each.results(), expected)
        bounds = case.bf16_bounds if each.bf16 else FP32_BOUNDS
        Check("gradients, relative", errors[1], bounds[1])
        checks[name] = Check("projections, relative", errors[0], bounds[0])
        notes[name] = f"projections {errors[0]:.1g}, gradients {errors[1]:.1g} off {PLAIN}"
    peaks = {}
    for name, each in passes.items():
        each.model.zero_grad(set_to_none=True)  # so that a call's gradients are of the call
        peaks[name] = peak_mib(each)

    sizes = {name: getattr(case, name) for name in ("encoder", "stem", "image_size", "views")}
    describe(
        benchmark,
        device=DEVICE_NAME,
        sizes=sizes,
        peak_mib=peaks,
        checks=checks,
        missing=missing,
        notes=notes,
        ours=[name for name in passes if name in SETUPS and name != OURS],
    )
    benchmark.extra_info["precision_of_a_run"] = choose_precision("auto", DEVICE).why
    with capsys.disabled():
        title = f"{case.encoder}, stem {case.stem}, {case.views} views of {case.image_size}², {DEVICE_NAME}"
        print(f"\n{title}; {timing.rounds} rounds, median (quartiles)")
        for name, spread in timing.milliseconds.items():
            ratio = f"{timing.speedup[name].median:.2f} x" if name in timing.speedup else ""
            print(f"  {name:38} {spread!s:>28} ms {ratio:>8} {peaks[name]:7.0f} MiB  {notes[name]}")
        for name, why in missing.items():
            print(f"  {name:38} not here: {why}")
