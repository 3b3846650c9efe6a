"""Batch normalisation over the batch of all ranks, on GPUs and on CPUs."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsimclr.distributed import sum_over_ranks


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm, which refuses tensors on a CPU, with a plain implementation for those."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or not self.training:
            return super().forward(input)
        group: Any = self.process_group or dist.group.WORLD
        # Under bf16 autocast, statistics are float32: as torch's own batch normalisation has them.
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [d for d in range(x.ndim) if d != 1]
        view = [1, -1] + [1] * (x.ndim - 2)
        count = torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype)
        total = sum_over_ranks(torch.cat([x.sum(dims), count]), group)
        mean, everyone = total[:-1] / total[-1], total[-1].detach()
        centered = x - mean.view(view)
        variance = sum_over_ranks(centered.square().sum(dims), group) / everyone
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                unbiased = variance * (everyone / (everyone - 1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        y = centered * (variance + self.eps).rsqrt().view(view)
        if self.affine:
            y = y * self.weight.view(view) + self.bias.view(view)
        return y.to(input.dtype)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm replaced by one over all ranks; parameters and statistics are kept as they are."""
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in synced.modules():
        if type(child) is nn.SyncBatchNorm:
            child.__class__ = SyncBatchNorm  # the same parameters and buffers, another forward
    return synced
