"""Forward and backward of encoder and projector: channels-last or not, float32 or bf16, compiled or not.

    python -m pytest benchmarks/bench_encoder.py --benchmark-json=benchmarks/results/encoder-DEVICE.json

The batch of views and the gradient of the projections are fixed: there is no loader, no loss and no optimizer. The
first contender uses the defaults of fastsimclr.train: channels-last, and bf16 if the hardware supports it. Hardware
without bf16 emulates it; there the bf16 contenders are left out. Models are compiled as by `--compile true`;
compilation is not timed. "torchvision" is the same model with nn.Conv2d everywhere, as in torchvision's ResNet.

After timing, projections and gradients are compared with those of "torchvision, float32", by the norm of their
difference. The last BatchNorm scale of each residual branch, zero at initialization, is set to 0.2: at zero most layers
would have no gradient to compare. At 1, an untrained ResNet is chaotic: bf16 then changes its gradients as much as
other views do.
"""

import gc
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import peak_mib
from benchmarks.suite import DEVICE, NO_TIME_TO_COMPILE, ON_GPU, SMALL, Check, Suite, error_line, relative_error
from benchmarks.train_contenders import simclr, with_plain_convolutions
from fastsimclr.malloc import keep_freed_memory
from fastsimclr.precision import choose_precision

BRANCH_SCALE = 0.2
FP32_BOUNDS = 1e-3, 5e-2  # the order of summation differs; measured 4e-5 and 0.01


@dataclass(frozen=True)
class Case:
    """One encoder and its batch of views.

    bf16_bounds: bounds of the relative errors of projections and gradients; measured 0.02 to 0.03 and 0.17 with
    ResNet-18, 0.05 to 0.08 and 0.45 with ResNet-50. Unrelated projections or gradients differ by 1.4.
    """

    encoder: str
    stem: str
    image_size: int
    num_views: int
    rounds: int
    bf16_bounds: tuple[float, float]


CASES = (
    Case("resnet18", "small", 32, 8 if SMALL else 1024 if ON_GPU else 256, 2 if SMALL else 10, (0.05, 0.3)),
    Case("resnet50", "imagenet", *((32, 8, 2) if SMALL else (224, 256 if ON_GPU else 8, 7)), (0.15, 0.7)),
)
CONTENDERS = {  # bf16, channels-last, compiled, plain convolutions
    "bf16, channels-last": (True, True, False, False),
    "float32, channels-last": (False, True, False, False),
    "float32": (False, False, False, False),
    "bf16": (True, False, False, False),
    "bf16, channels-last, torch.compile": (True, True, True, False),
    "float32, channels-last, torch.compile": (False, True, True, False),
    "torchvision, bf16, channels-last": (True, True, False, True),
    "torchvision, float32": (False, False, False, True),
}
PLAIN = "torchvision, float32"


class Pass:
    """A contender: a call runs forward and backward. All contenders have the same weights, views and gradient."""

    def __init__(self, case: Case, bf16: bool, channels_last: bool, compiled: bool, plain: bool) -> None:
        self.bf16 = bf16
        self.model = simclr(case.encoder, case.stem, case.image_size)  # also seeds the random tensors below
        if plain:
            with_plain_convolutions(self.model)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
                nn.init.constant_(module.weight, BRANCH_SCALE)
        coarse = torch.randn(case.num_views, 3, 4, 4, device=DEVICE)  # smooth views differ as images do; noise does not
        views = F.interpolate(coarse, size=case.image_size, mode="bicubic")
        self.dz = torch.randn(case.num_views, 128, device=DEVICE)
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
        """Return the projections, and the gradients of all parameters in one vector."""
        z = self().detach().float()
        return z, torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def prepare(case: Case, suite: Suite) -> tuple[dict[str, Pass], dict[str, str]]:
    """Return the contenders, compiled where requested, and the reasons why others are left out."""
    precision = choose_precision("auto", DEVICE)
    passes: dict[str, Pass] = {}
    missing: dict[str, str] = {}
    for name, (bf16, channels_last, compiled, plain) in CONTENDERS.items():
        if bf16 and precision.autocast != torch.bfloat16:
            missing[name] = precision.why
        elif compiled and not suite.may_compile():
            missing[name] = NO_TIME_TO_COMPILE
        else:
            passes[name] = Pass(case, bf16, channels_last, compiled, plain)
            try:
                if compiled:
                    passes[name]()
            except Exception as error:
                del passes[name]
                missing[name] = f"does not compile: {error_line(error)}"
    return passes, missing


@pytest.mark.filterwarnings("default")  # warnings of the compiler are not errors
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.encoder)
@pytest.mark.benchmark(group="encoder forward + backward")
def test_encoder(suite: Suite, case: Case) -> None:
    gc.collect()
    keep_freed_memory()  # as fastsimclr.train does; all contenders have this advantage
    torch.compiler.reset()
    torch.backends.cudnn.benchmark = True  # as in fastsimclr.train
    passes, missing = prepare(case, suite)
    sizes = {name: getattr(case, name) for name in ("encoder", "stem", "image_size")} | {"views": case.num_views}
    suite.interleave(passes, sizes=sizes, rounds=case.rounds)
    expected = passes[PLAIN].results()
    checks, notes, peaks = {}, {}, {}
    for name, each in passes.items():
        errors = [relative_error(*pair) for pair in zip(each.results(), expected, strict=True)]
        bounds = case.bf16_bounds if each.bf16 else FP32_BOUNDS
        Check("relative error of the gradients", errors[1], bounds[1])
        checks[name] = Check("relative error of the projections", errors[0], bounds[0])
        notes[name] = f"relative error against {PLAIN}: projections {errors[0]:.1g}, gradients {errors[1]:.1g}"
        each.model.zero_grad(set_to_none=True)  # so that the peak includes the gradients
        peaks[name] = peak_mib(each)
    _, *others = passes
    suite.record(
        peak_mib=peaks,
        checks=checks,
        missing=missing,
        notes=notes,
        variants=[name for name in others if not name.startswith("torchvision")],
    )
