"""The time and memory of a step on several ranks, predicted from a run on one device.

docs/scaling.md explains the formulas and compares them with measurements.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fastsimclr.reporting.numbers import count, percent

LARGE_SHARE = 0.1
"""A part that takes more than this share of a step limits the scaling."""
BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's default
UNSHARED_WORK = {"tiled": 2.0, "fused": 1.2, "reference": 1.0}
"""Work of the loss per pair of views on several ranks, relative to one process, which uses the symmetry of the
similarities: tiled in both passes, fused in the forward pass only (2.5 instead of 3 matrix products)."""
OPTIMIZER_TENSORS = {"lars": 1, "sgd": 1, "adamw": 2, "muon": 1}
"""Tensors of a parameter's size that the optimizer keeps."""
ADVICE = {
    "communication": "use a faster link, or more images per rank",
    "loss": "keep the global batch size from there on, or use --loss.precision medium",
}
"""What to do about a part that limits the scaling."""


@dataclass(frozen=True)
class Cluster:
    """What the ranks run on."""

    bandwidth: float
    """Of the slowest link between two ranks, in one direction, in 10^9 bytes per second."""
    latency_us: float = 0.0
    """Time that a collective of 1 KiB adds to a step."""
    cores: int | None = None
    """CPU cores that all ranks share to compute and communicate; None: each rank has a device of its own."""

    def transfer_ms(self, size: float) -> float:
        """Time to send `size` bytes."""
        return size / self.bandwidth / 1e6


@dataclass(frozen=True)
class Step:
    """What a run of one process has measured: the milliseconds of a step, and memory."""

    steps: int
    """Number of steps that were measured."""
    batch_size: int
    views_ms: float
    """The time that views are waited for or computed."""
    forward_ms: float
    backward_ms: float
    loss_ms: float
    optimizer_ms: float
    other_ms: float
    peak_mib: float | None

    @property
    def step_ms(self) -> float:
        encoder_ms = self.forward_ms + self.backward_ms
        return self.views_ms + encoder_ms + self.loss_ms + self.optimizer_ms + self.other_ms


@dataclass(frozen=True)
class Setup:
    """The sizes and options on which time and memory depend."""

    encoder: str
    on_gpu: bool
    threads: int
    images: int
    """In the data set."""
    micro_batch_size: int | None
    num_views: int
    parameters: int
    parameter_bytes: int
    optimizer: str
    synchronized_norms: int
    """Batch normalizations that several ranks synchronize."""
    projection_width: int
    loss_backend: str
    global_negatives: bool
    activation_mib_per_image: float | None
    """Estimated before the first step; on a CPU only."""

    @property
    def parameter_mib(self) -> float:
        """Memory of the weights; that of their gradients is the same."""
        return self.parameters * self.parameter_bytes / 2**20

    @property
    def pairs(self) -> int:
        """Number of pairs of views. Each has a loss of its own."""
        return math.comb(self.num_views, 2)

    def gathered_bytes(self, batch_size: int) -> int:
        """Bytes of what the loss gathers: the projections of a pair of views, and two numbers for each projection."""
        return self.pairs * 2 * batch_size * (self.projection_width + 2) * self.parameter_bytes

    def encoded_at_once(self, local_batch: int) -> int:
        """Images whose activations are in memory at a time."""
        return min(local_batch, self.micro_batch_size or local_batch)

    def micro_batches(self, local_batch: int) -> int:
        return math.ceil(local_batch / self.encoded_at_once(local_batch))

    def forward_passes(self, local_batch: int) -> int:
        """Forward passes of each image: micro-batches need a second one."""
        return 2 if self.micro_batches(local_batch) > 1 else 1


@dataclass(frozen=True)
class Measured:
    """One run of a single process, or two with different batch sizes."""

    setup: Setup
    steps: tuple[Step, ...]
    """By batch size."""

    def at(self, part: str, x: float, power: int = 1) -> float:
        """Return a part's milliseconds at `x`, where it is a line over batch_size ** power.

        The line passes through the measured steps; with one step, also through zero.
        """
        points = [(float(step.batch_size**power), float(getattr(step, f"{part}_ms"))) for step in self.steps]
        (x0, y0), (x1, y1) = points if len(points) == 2 else [(0.0, 0.0), *points]
        return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))

    def mean(self, part: str) -> float:
        """Return the milliseconds of a part that does not depend on the batch size."""
        return sum(getattr(step, f"{part}_ms") for step in self.steps) / len(self.steps)


@dataclass(frozen=True)
class Prediction:
    """A step on `ranks` ranks."""

    ranks: int
    batch_size: int
    """Images per step over all ranks."""
    parts_ms: dict[str, float]
    """The parts of the step: views, encoder, loss, communication, optimizer, other."""
    step_ms: float
    images_per_second: float
    epoch_seconds: float
    efficiency: float
    """Images per second and rank, relative to the measured run."""
    memory_mib: float | None
    """Of a rank, without the loader's workers; None if the run has not recorded its own, or for the reference loss."""

    def share(self, part: str) -> float:
        return self.parts_ms[part] / self.step_ms


def predict(measured: Measured, cluster: Cluster, ranks: int, batch_size: int, images: int) -> Prediction:
    """Predict a step of `batch_size` images over `ranks` ranks, and an epoch of `images` images."""
    setup, last = measured.setup, measured.steps[-1]
    local = math.ceil(batch_size / ranks)
    passes = setup.forward_passes(local) / setup.forward_passes(last.batch_size)
    parts_ms = {
        "views": measured.at("views", local),
        "encoder": measured.at("forward", local) * passes + measured.at("backward", local),
        "loss": _loss_ms(measured, ranks, local, batch_size),
        "communication": _communication_ms(measured, cluster, ranks, local, batch_size),
        "optimizer": measured.mean("optimizer"),
        "other": measured.mean("other"),
    }
    sharing = max(1.0, ranks * setup.threads / cluster.cores) if cluster.cores else 1.0
    parts_ms = {name: sharing * ms for name, ms in parts_ms.items()}
    step_ms = sum(parts_ms.values())
    return Prediction(
        ranks=ranks,
        batch_size=batch_size,
        parts_ms=parts_ms,
        step_ms=step_ms,
        images_per_second=1000 * batch_size / step_ms,
        epoch_seconds=math.ceil(images / batch_size) * step_ms / 1000,
        efficiency=batch_size / step_ms / (ranks * last.batch_size / last.step_ms),
        memory_mib=_memory_mib(measured, ranks, local, batch_size),
    )


def _loss_ms(measured: Measured, ranks: int, local: int, batch_size: int) -> float:
    """The loss compares the views of `local` images with those of all."""
    setup = measured.setup
    if ranks == 1 or not setup.global_negatives:
        return measured.at("loss", local**2, power=2)
    return measured.at("loss", UNSHARED_WORK[setup.loss_backend] * local * batch_size, power=2)


def _communication_ms(measured: Measured, cluster: Cluster, ranks: int, local: int, batch_size: int) -> float:
    """The communication that no computation hides."""
    if ranks == 1:
        return 0.0
    setup, latency_ms = measured.setup, cluster.latency_us / 1000
    gradient_bytes = setup.parameters * setup.parameter_bytes
    buckets = math.ceil(gradient_bytes / BUCKET_BYTES)
    gradients_ms = buckets * latency_ms + cluster.transfer_ms(2 * (ranks - 1) / ranks * gradient_bytes)
    micro_batches = setup.micro_batches(local)
    if setup.on_gpu:  # buckets are sent during the last backward pass, but the last one after it
        hidden_ms = measured.at("backward", local) / micro_batches
        gradients_ms = max(gradients_ms / buckets, gradients_ms - hidden_ms)
    collectives = 2  # the batch sizes before the step, and the mean loss after it
    gathered_bytes = 0.0
    if setup.global_negatives:
        collectives += 3 * setup.pairs  # the number of rows, the rows, and two numbers for each
        gathered_bytes = (ranks - 1) / ranks * setup.gathered_bytes(batch_size)
    collectives += setup.synchronized_norms * micro_batches * (setup.forward_passes(local) + 1)
    return gradients_ms + collectives * latency_ms + cluster.transfer_ms(gathered_bytes)


def _memory_mib(measured: Measured, ranks: int, local: int, batch_size: int) -> float | None:
    """The measured peak with the activations of another number of images, the gathered projections and gradients."""
    setup, last = measured.setup, measured.steps[-1]
    if last.peak_mib is None or setup.loss_backend == "reference":  # which needs O(N^2) memory
        return None
    per_image = setup.activation_mib_per_image
    if per_image is None:  # all but the weights and the state of the optimizer
        kept = setup.parameter_mib * (1 + OPTIMIZER_TENSORS[setup.optimizer])
        per_image = max(0.0, last.peak_mib - kept) / setup.encoded_at_once(last.batch_size)
    memory = last.peak_mib + per_image * (setup.encoded_at_once(local) - setup.encoded_at_once(last.batch_size))
    if ranks > 1:
        memory += setup.parameter_mib  # DDP's buckets of gradients; a single process frees them before the peak
        if setup.global_negatives:
            memory += setup.gathered_bytes(batch_size) / 2**20
    return memory


def find_limits(predictions: Iterable[Prediction]) -> list[str]:
    """Return a line for each part that limits the scaling, or one that says that none does.

    predictions: for 1, 2, 3, … ranks.
    """
    found: dict[str, str] = {}
    last = 0
    for prediction in predictions:
        last = prediction.ranks
        for part, advice in ADVICE.items():
            share = prediction.share(part)
            if part not in found and share > LARGE_SHARE:
                where = f"more than a tenth of the step from {count(last, 'rank')} on ({percent(share)})"
                found[part] = f"{part}: {where}; {advice}"
    return list(found.values()) or [f"{' and '.join(ADVICE)}: at most a tenth of the step each, up to {last:,} ranks"]
