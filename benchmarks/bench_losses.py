"""Forward and backward of InfoNCE and SupCon: fastsimclr and other packages' dense losses.

    python -m pytest benchmarks/bench_losses.py --benchmark-json=benchmarks/results/losses-DEVICE.json

- InfoNCE of two towers, both directions, as OpenCLIP's ClipLoss;
- InfoNCE with a queue, as in MoCo's repository, whose loss is written out here;
- SupCon, as SupConLoss of pytorch-metric-learning.

Peak memory is the peak of torch's allocator beyond the inputs, including the gradients. Run nothing else on the machine
meanwhile, or measure one thread (OMP_NUM_THREADS=1).
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import peak_mib, settle_heap
from benchmarks.suite import DEVICE, ON_GPU, SMALL, Check, Suite, relative_error, verdict
from fastsimclr.loss import info_nce, sup_con

TEMPERATURE = 0.1
EXACT, MEDIUM = (1e-4, 1e-4) if ON_GPU else (1e-5, 1e-4), (1e-3, 2e-2)  # of the loss and of the gradients
FASTEST = "fused" if ON_GPU else "tiled"
CLASSES = 10 if SMALL else 100  # each row needs another one of its class
Loss = Callable[..., Tensor]


@dataclass
class Task:
    """One loss: its inputs, and its implementations by name, fastsimclr's in both precisions first."""

    name: str
    inputs: tuple[Tensor, ...]
    """Which require a gradient."""
    ours: Loss
    dense: Loss
    others: dict[str, Loss] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    faster_than: dict[str, float] = field(default_factory=dict)
    """Targets on a CPU: how many times faster than others."""

    @property
    def contenders(self) -> dict[str, Loss]:
        return {
            FASTEST: functools.partial(self.ours, backend=FASTEST, precision="highest"),
            f"{FASTEST}, medium": functools.partial(self.ours, backend=FASTEST, precision="medium"),
            **self.others,
            "dense": self.dense,
        }

    def step(self, loss: Loss) -> tuple[Tensor, ...]:
        value = loss(*self.inputs)
        return value.detach(), *torch.autograd.grad(value, self.inputs)


def rows(count: int, width: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=random).to(DEVICE).requires_grad_()


def two_towers() -> Task:
    n, width = (128, 32) if SMALL else (8192, 512)

    def dense(a: Tensor, b: Tensor) -> Tensor:
        s = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / TEMPERATURE
        labels = torch.arange(n, device=s.device)
        return (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2

    task = Task(
        "InfoNCE of two towers",
        (rows(n, width, 0), rows(n, width, 1)),
        functools.partial(info_nce, temperature=TEMPERATURE),
        dense,
        sizes={"rows": n, "width": width},
        faster_than={"OpenCLIP": 3.0},
    )
    try:
        from open_clip.loss import ClipLoss

        clip = ClipLoss()
        task.others["OpenCLIP"] = lambda a, b: clip(F.normalize(a, dim=1), F.normalize(b, dim=1), 1 / TEMPERATURE)
    except ImportError as error:
        task.missing["OpenCLIP"] = str(error)
    return task


def with_queue() -> Task:
    n, width, length = (32, 32, 256) if SMALL else (256, 128, 65536)
    queue = F.normalize(rows(length, width, 2).detach(), dim=1)

    def dense(a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        s = torch.cat([(a * b).sum(1, keepdim=True), (a @ b.T).fill_diagonal_(-torch.inf), a @ queue.T], dim=1)
        return F.cross_entropy(s / TEMPERATURE, torch.zeros(n, dtype=torch.int64, device=s.device))

    return Task(
        "InfoNCE with a queue",
        (rows(n, width, 0), rows(n, width, 1)),
        functools.partial(info_nce, temperature=TEMPERATURE, symmetric=False, queue=queue),
        dense,
        sizes={"rows": n, "queue": length, "width": width},
    )


def several_positives() -> Task:
    n, width = (128, 32) if SMALL else (4096, 128)
    labels = torch.arange(n, device=DEVICE) % CLASSES

    def dense(z: Tensor) -> Tensor:
        z = F.normalize(z, dim=1)
        s = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        positive = (labels[:, None] == labels).fill_diagonal_(False)
        log_p = s - s.logsumexp(dim=1, keepdim=True)
        return -(log_p.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)).mean()

    task = Task(
        "SupCon",
        (rows(n, width, 0),),
        lambda z, **options: sup_con(z, labels, TEMPERATURE, **options),
        dense,
        sizes={"rows": n, "width": width},
    )
    try:
        from pytorch_metric_learning.losses import SupConLoss

        theirs = SupConLoss(temperature=TEMPERATURE)
        task.others["pytorch-metric-learning"] = lambda z: theirs(z, labels)
    except ImportError as error:
        task.missing["pytorch-metric-learning"] = str(error)
    return task


@pytest.mark.filterwarnings("default")  # warnings of other packages are not errors
@pytest.mark.parametrize("make", [two_towers, with_queue, several_positives])
def test_loss(suite: Suite, make: Callable[[], Task]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from imports of other packages
        task = make()
    settle_heap()
    suite.benchmark.group = f"{task.name}, forward + backward"
    contenders = task.contenders
    expected = task.step(task.dense)
    checks, peaks = {}, {}
    for name, loss in contenders.items():
        bound = MEDIUM if name.endswith("medium") else EXACT
        errors = [relative_error(*pair) for pair in zip(task.step(loss), expected, strict=True)]
        Check("relative error of the gradients", max(errors[1:]), bound[1])
        checks[name] = Check("relative error of the loss", errors[0], bound[0])
        peaks[name] = peak_mib(lambda loss=loss: task.step(loss))  # type: ignore[misc]
    steps = {name: functools.partial(task.step, loss) for name, loss in contenders.items()}
    timing = suite.interleave(steps, sizes=task.sizes, rounds=2 if SMALL else 7)
    suite.record(
        peak_mib=peaks, checks=checks, missing=task.missing, variants=[name for name in contenders if "medium" in name]
    )
    if not (ON_GPU or SMALL):
        verdicts = [
            verdict(f"times faster than {name}", timing.speedup[name].median, at_least=least)
            for name, least in task.faster_than.items()
            if name in timing.speedup
        ]
        suite.record_targets(*verdicts)
