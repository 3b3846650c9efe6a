"""The NT-Xent loss, forward and backward: ours, the dense loss as everyone writes it, and other packages'.

    python -m pytest benchmarks/bench_nt_xent.py --benchmark-json=benchmarks/results/nt_xent_cpu.json

BENCH_M and BENCH_D choose the sizes (views, and numbers a projection): BENCH_M=4096 BENCH_D=64,128,256.

Beside them runs a plain product of 2048 x 2048 float32 matrices. The tiled loss needs 4 M^2 D flops in products (it
uses that the similarities are symmetric); what they would take at that product's rate is the least that it could take.
Peak memory is what torch's allocator holds at most beyond the inputs, gradients included (on a CPU torch.profiler sees
it; scratch that a matrix library takes by itself is not in it).

Leave the machine alone meanwhile, or measure one thread (OMP_NUM_THREADS=1). A loss in many small steps waits for its
slowest thread at each of them: where another process takes a core, it suffers far more than one in a few large steps,
and no ratio mends that.

"medium" allows bf16 products: oneDNN uses bf16 where the CPU multiplies it fast (AMX), and else its own float32
product, which on a CPU that is not Intel's may be twice as fast as torch.mm's.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.interleaved import Timing, interleave
from fastsimclr.loss import nt_xent

TEMPERATURE = 0.1
MATRIX = 2048
SIZES = [int(m) for m in os.environ.get("BENCH_M", "512,2048,4096,8192").split(",")]
WIDTHS = [int(d) for d in os.environ.get("BENCH_D", "128").split(",")]
# Views, at D=128: how many times faster than whom we mean to be, and the most that we may hold and take.
SPEEDUP_TARGETS = {4096: {"dense": 3.0, "dense, torch.compile": 1.4, "lightly": 3.0}}
PEAK_MIB_TARGETS = {8192: 64.0}
TIMES_SGEMM_TARGETS = {8192: 1.6}
PML_LARGEST = 512  # it lists each positive with each negative pair: 134 million floats at 512, M^3

Loss = Callable[[Tensor, Tensor], Tensor]


def dense(z1: Tensor, z2: Tensor) -> Tensor:
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = z @ z.T / TEMPERATURE
    s = s.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=s.device), -torch.inf)
    return F.cross_entropy(s, torch.arange(2 * n, device=s.device).roll(n))


def contenders(m: int) -> tuple[dict[str, Loss], dict[str, str]]:
    """The losses by name, ours first; and of those that are not here, why."""
    found: dict[str, Loss] = {
        "tiled": lambda z1, z2: nt_xent(z1, z2, TEMPERATURE, backend="tiled", precision="highest"),
        "tiled, medium": lambda z1, z2: nt_xent(z1, z2, TEMPERATURE, backend="tiled", precision="medium"),
        "dense": dense,
    }
    missing: dict[str, str] = {}
    with warnings.catch_warnings():  # other packages' imports
        warnings.simplefilter("ignore")
        torch.compiler.reset()
        compiled = torch.compile(dense, dynamic=False)
        try:
            compiled(torch.ones(2, 2), torch.ones(2, 2))
            found["dense, torch.compile"] = compiled
        except Exception as error:
            missing["dense, torch.compile"] = f"it does not compile here: {str(error).splitlines()[0]}"
        try:
            from lightly.loss import NTXentLoss as LightlyLoss

            found["lightly"] = LightlyLoss(temperature=TEMPERATURE)
        except ImportError as error:
            missing["lightly"] = str(error)
        try:
            from pytorch_metric_learning.losses import NTXentLoss as MetricLearningLoss
            from pytorch_metric_learning.losses import SelfSupervisedLoss

            if m <= PML_LARGEST:
                found["pytorch-metric-learning"] = SelfSupervisedLoss(MetricLearningLoss(temperature=TEMPERATURE))
            else:
                missing["pytorch-metric-learning"] = f"takes M^3 memory: up to M={PML_LARGEST} only"
        except ImportError as error:
            missing["pytorch-metric-learning"] = str(error)
    return found, missing


def peak_mib(step: Callable[[], object], device: str) -> float:
    """The most that torch's allocator holds during `step`, beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = [event["args"] for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    allocated, peak = 0, 0
    for event in sorted(events, key=lambda event: event["Ev Idx"]):
        allocated += event["Bytes"]
        peak = max(peak, allocated)
    return peak / 2**20


def assert_same_function(results: dict[str, tuple[Tensor, ...]]) -> None:
    loss, *gradients = results["dense"]
    for name, (its_loss, *its_gradients) in results.items():
        loss_bound, gradient_bound = (1e-3, 2e-2) if "medium" in name else (1e-5, 1e-4)
        assert abs(its_loss - loss) <= loss_bound * abs(loss), f"{name}: loss {its_loss}, the dense one is {loss}"
        for expected, got in zip(gradients, its_gradients, strict=True):
            assert (got - expected).norm() <= gradient_bound * expected.norm(), f"{name}: another gradient"


def verdicts(m: int, d: int, timing: Timing, peak: float, times_sgemm: float) -> list[str]:
    """Each target of this size, and whether it is met."""
    if d != 128:
        return []
    checks = [
        (f"{target} times faster than {rival}", timing.speedup[rival].median, timing.speedup[rival].median >= target)
        for rival, target in SPEEDUP_TARGETS.get(m, {}).items()
        if rival in timing.speedup
    ]
    if m in PEAK_MIB_TARGETS:
        checks.append((f"at most {PEAK_MIB_TARGETS[m]} MiB", peak, peak <= PEAK_MIB_TARGETS[m]))
    if m in TIMES_SGEMM_TARGETS:
        target = TIMES_SGEMM_TARGETS[m]
        checks.append((f"at most {target} times its products at sgemm's rate", times_sgemm, times_sgemm <= target))
    return [f"{text}: {'met' if met else 'MISSED'} ({got:.2f})" for text, got, met in checks]


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.benchmark(group="NT-Xent, forward and backward")
def test_nt_xent(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], m: int, d: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.ones(31 * 2**18)  # settles glibc's heap as a training run would: see bench_optimizer.py
    x = torch.randn(m // 2, d, device=device)
    # A loss of about 0.1 to 1, as in training: views that have much in common.
    z1, z2 = ((x + 0.5 * torch.randn_like(x)).requires_grad_() for _ in range(2))
    a, b = (torch.randn(MATRIX, MATRIX, device=device) for _ in range(2))
    product = torch.empty_like(a)

    losses, missing = contenders(m)
    results: dict[str, tuple[Tensor, ...]] = {}

    def step(name: str) -> None:
        loss = losses[name](z1, z2)
        results[name] = (loss.detach(), *torch.autograd.grad(loss, (z1, z2)))

    calls: dict[str, Callable[[], object]] = {name: lambda name=name: step(name) for name in losses}  # type: ignore[misc]
    calls["sgemm"] = lambda: torch.mm(a, b, out=product)
    timing = interleave(
        benchmark,
        calls,
        rounds=7 if m >= 8192 else 15,
        warmup_rounds=1 if m >= 8192 else 3,
        synchronize=torch.cuda.synchronize if device == "cuda" else lambda: None,
    )
    assert_same_function(results)
    results.clear()
    peaks = {name: peak_mib(calls[name], device) for name in losses}
    flops = 4 * m * m * d
    sgemm_gflops = 2 * MATRIX**3 / timing.milliseconds["sgemm"].median / 1e6
    # From the ratios of the rounds, so that a slow second does not count.
    times_sgemm = 2 * MATRIX**3 / flops / timing.speedup["sgemm"].median

    lines = [f"NT-Xent forward + backward, {m} views of {d} float32, {device}: {timing}"]
    lines += [f"  {name:24} {peak:.1f} MiB above the inputs" for name, peak in peaks.items()]
    lines += [f"  {name:24} not here: {why}" for name, why in missing.items()]
    lines.append(
        f"  tiled takes {times_sgemm:.2f} times what its {flops / 1e9:.1f} GFLOP take at {sgemm_gflops:.0f} GFLOP/s"
    )
    met = verdicts(m, d, timing, peaks["tiled"], times_sgemm)
    lines += [f"  target, {each}" for each in met]
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    benchmark.extra_info.update(
        device=device,
        views=m,
        width=d,
        peak_mib=peaks,
        peak_mib_measured_by="torch.cuda" if device == "cuda" else "torch.profiler",
        sgemm_gflops=sgemm_gflops,
        gflop_of_products=flops / 1e9,
        tiled_times_sgemm=times_sgemm,
        tiled_fraction_of_sgemm_rate=1 / times_sgemm,
        missing=missing,
        targets=met,
    )
