"""Health of a run without labels: figures of the representations h and projections z, a few times per epoch."""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.distributed import World, all_gather_rows
from fastsimclr.progress_bar import print_line
from fastsimclr.training.step import Outputs

IMAGES = 512
"""Largest number of images of a batch that the figures are computed on: 1,024 projections, 512 representations."""
PER_EPOCH, MIN_STEPS = 4, 10
"""Measurements per epoch, and the least steps between two of them."""

MIN_EFFECTIVE_RANK = 2.0
"""An effective rank of z below this is a collapse: the singular values then have an entropy of less than one bit, as
if all projections were on a line. A constant encoder has 1."""
CHANCE_HITS = 4
"""With 2N random projections, the number of those whose positive is the nearest has a mean of 1 and is nearly Poisson
distributed: it is above 4 in 0.4 % of the measurements."""
MIN_IMAGES = 16
"""With fewer images, chance is too near to what is learned to tell them apart."""

_EPSILON = 1e-7  # of RankMe, eq. 2
_DEAD = 1e-3  # standard deviation, relative to the root mean square of all entries of h


def contrastive_accuracy(z1: Tensor, z2: Tensor) -> Tensor:
    """Fraction of the 2N projections whose positive has a higher cosine similarity than each of the 2N - 2 negatives.

    The top-1 accuracy of the classification that NT-Xent is the cross-entropy of (SimCLR, eq. 1). Chance is 1 / (2N -
    1); a tie is a miss, so that a constant encoder has 0.
    z1, z2: (N, D) float; row i of both are the two views of image i. Returns a 0-dim float64 tensor.
    """
    z = F.normalize(torch.cat([z1, z2]).double(), dim=1)
    similarity = (z @ z.T).fill_diagonal_(-torch.inf)
    rows = torch.arange(len(z), device=z.device)
    positives = rows.roll(len(z1))
    positive = similarity[rows, positives]
    similarity[rows, positives] = -torch.inf
    return (positive > similarity.amax(dim=1)).double().mean()


def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean of |z1 - z2|^2 over the positive pairs, normalized: 0 (equal) to 4 (opposite).

    Wang & Isola, arXiv 2005.10242, section 4.1 with alpha = 2. z1, z2: (N, D) float. Returns a 0-dim float64 tensor.
    """
    z1, z2 = (F.normalize(z.double(), dim=1) for z in (z1, z2))
    return (z1 - z2).square().sum(dim=1).mean()


def uniformity(z: Tensor) -> Tensor:
    """Logarithm of the mean of exp(-2 |zi - zj|^2) over all pairs of images, normalized: 0 for a constant encoder.

    The lower, the more evenly z is distributed over the sphere: at best -4 for a large D. Wang & Isola, arXiv
    2005.10242, section 4.1 with t = 2. z: (N, D) float, one view of each image. Returns a 0-dim float64 tensor.
    """
    z = F.normalize(z.double(), dim=1)
    similarity = z @ z.T
    pairs = torch.ones_like(similarity, dtype=torch.bool).triu_(diagonal=1)
    exponents = (4 * similarity - 4).masked_fill(~pairs, -torch.inf)  # |a - b|^2 = 2 - 2 a·b
    return exponents.flatten().logsumexp(dim=0) - math.log(len(z) * (len(z) - 1) / 2)


def mean_norm(h: Tensor) -> Tensor:
    """Mean Euclidean norm of the rows of h, (N, F) float. Returns a 0-dim float64 tensor."""
    return h.double().norm(dim=1).mean()


def dead_dimensions(h: Tensor) -> Tensor:
    """Fraction of the dimensions of h that are constant: their standard deviation over the images is at most 0.001
    times the root mean square of all entries of h.

    h: (N, F) float. Returns a 0-dim float64 tensor.
    """
    h = h.double()
    return (h.std(dim=0, correction=0) <= _DEAD * h.square().mean().sqrt()).double().mean()


def gram(x: Tensor) -> Tensor:
    """Smaller one of x xᵀ and xᵀ x in float64: its eigenvalues are the squared singular values of x, (N, F) float."""
    x = x.double()
    return x @ x.T if len(x) < x.shape[1] else x.T @ x


def effective_rank(of: Tensor) -> float:
    """Effective rank of a matrix x, from `gram(x)` on the CPU: 1 to the smaller of its dimensions; 0 if x is 0.

    exp of the entropy of the singular values s: p = s / sum(s) + 1e-7, exp(-sum(p log p)). RankMe, arXiv 2210.02885,
    eq. 2.
    """
    singular = torch.linalg.eigvalsh(of).clamp(min=0).sqrt()
    if not singular.any():
        return 0.0
    p = singular / singular.sum() + _EPSILON
    return float((-(p * p.log()).sum()).exp())


class Health:
    """Measures the figures of some steps, adds them to the records, and warns once if the run does not learn.

    All ranks call the same methods together. On a GPU the products are computed there, and the eigenvalues, whose
    computation on the GPU would make the host wait, on the CPU when the record is completed, while the next step runs.
    """

    def __init__(self, world: World, *, batch_size: int, steps_per_epoch: int, warmup_steps: int) -> None:
        self._world, self._batch_size, self._warmup_steps = world, batch_size, warmup_steps
        self._every = max(MIN_STEPS, steps_per_epoch // PER_EPOCH)
        self._has_warned = False
        self._pending: dict[int, tuple[list[str], int, Tensor, Tensor]] = {}

    def measure(self, step: int, outputs: Outputs, local_batch_sizes: list[int]) -> dict[str, Tensor]:
        """Return the figures of a step, 0-dim tensors of z's dtype, if they are due; those of `complete` come later.

        They are due at step 1, which has the initial weights, and four times per epoch, but at most at every tenth
        step. A smaller batch at the end of an epoch is left out: it has fewer negatives.
        step: its number in the metrics, from 1. local_batch_sizes: images of this step on each rank.
        """
        if (step - 1) % self._every != 0 or sum(local_batch_sizes) < self._batch_size:
            return {}
        z1, z2, h = self._sample([*outputs.z[:2], outputs.h], local_batch_sizes)
        figures = {
            "contrastive_accuracy": contrastive_accuracy(z1, z2),
            "alignment": alignment(z1, z2),
            "uniformity": (uniformity(z1) + uniformity(z2)) / 2,
            "mean_norm_h": mean_norm(h),
            "dead_dimensions_h": dead_dimensions(h),
        }
        self._pending[step] = [*figures], len(z1), _start_copy(gram(h)), _start_copy(gram(z1))
        return {name: figure.to(z1.dtype) for name, figure in figures.items()}

    def complete(self, record: dict[str, Any]) -> None:
        """Add the effective ranks to the record of a measured step. Removes all figures if one is not finite."""
        if record["step"] not in self._pending:
            return
        names, images, of_h, of_z = self._pending.pop(record["step"])
        if not (of_h.isfinite().all() and of_z.isfinite().all() and all(math.isfinite(record[name]) for name in names)):
            for name in names:
                del record[name]
            return
        record |= {"effective_rank_h": effective_rank(of_h), "effective_rank_z": effective_rank(of_z)}
        is_started = record["step"] > self._warmup_steps and record["epoch"] > 0
        if is_started and images >= MIN_IMAGES and not self._has_warned:
            self._warn(record, images)

    def _sample(self, rows: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Return up to IMAGES rows of all ranks, evenly spaced in the global batch, for any number of ranks.

        rows: (B, ...) each, of this rank's images. Returns the same rows on all ranks, at least in float32.
        """
        rows = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in rows]
        stride = math.ceil(sum(sizes) / IMAGES)
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]  # index of each rank's first image in the batch
        kept = [range(-start % stride, size, stride) for start, size in zip(starts, sizes, strict=True)]
        rows = [each[kept[self._world.rank].start :: stride] for each in rows]
        if self._world.world_size == 1:
            return rows
        group = dist.group.WORLD
        assert group is not None
        return [all_gather_rows(each, [len(of_rank) for of_rank in kept], group) for each in rows]

    def _warn(self, record: dict[str, Any], images: int) -> None:
        accuracy, rank = record["contrastive_accuracy"], record["effective_rank_z"]
        if rank < MIN_EFFECTIVE_RANK:
            found = f"collapsed: the projections have an effective rank of {rank:.2f}"
        elif accuracy * 2 * images <= CHANCE_HITS:
            found = f"not learning: contrastive accuracy {accuracy:.2%}, chance is {1 / (2 * images - 1):.2%}"
        else:
            return
        self._has_warned = True
        if self._world.is_rank_zero:
            print_line(
                f"warning: step {record['step']}: {found}; try --optim.lr auto, and look at the views with "
                "`fastsimclr preview`"
            )


def _start_copy(matrix: Tensor) -> Tensor:
    """Start a copy from the GPU to the CPU, which is complete when the record of the step is."""
    if matrix.device.type == "cpu":
        return matrix
    return torch.empty_like(matrix, device="cpu", pin_memory=True).copy_(matrix, non_blocking=True)
