"""The NT-Xent loss with a dense similarity matrix and PyTorch's autograd. The tests compare against it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.distributed import gather_rows, gather_sizes

NORM_EPS = 1e-12  # as in torch.nn.functional.normalize


def row_norms(z: Tensor) -> Tensor:
    """Return the norms (M,) of z (M, D) by which F.normalize divides, but NaN for one that overflows.

    F.normalize would divide by infinity, and the row would count as one of zeros.
    """
    norms = torch.linalg.vector_norm(z, dim=1).clamp_min(NORM_EPS)
    return norms.masked_fill(norms == torch.inf, torch.nan)


def nt_xent_reference(
    z1: Tensor, z2: Tensor, temperature: Tensor, group: dist.ProcessGroup | None, mean: bool, decoupled: bool
) -> Tensor:
    """Compute SimCLR's eq. 1. Arguments and result as in `fastsimclr.nt_xent`. Holds several (2n, M) matrices."""
    n = z1.shape[0]
    dtype = torch.promote_types(z1.dtype, torch.float32)
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat([z1, z2]).to(dtype)  # (2n, D)
        z = z / row_norms(z)[:, None]
        sizes, offset, all_z = [2 * n], 0, z
        if group is not None:
            sizes = gather_sizes(2 * n, group, z.device)
            offset = sum(sizes[: dist.get_rank(group)])
            all_z = gather_rows(z, sizes, group)  # (M, D)
        s = z @ all_z.T / temperature.to(dtype)  # (2n, M)

        row = torch.arange(2 * n, device=z.device)
        positive = (row + n) % (2 * n) + offset
        negative = torch.ones_like(s, dtype=torch.bool)
        negative[row, row + offset] = False
        negative[row, positive] = False
        # log(sum over negatives / positive). Subtracting the positive from the logsumexp over all columns would cancel
        # near convergence.
        x = s.masked_fill(~negative, -torch.inf).logsumexp(dim=1) - s[row, positive]  # (2n,)
        losses = x if decoupled else -F.logsigmoid(-x)
        return losses.sum() * (len(sizes) / sum(sizes)) if mean else losses
