"""Batch normalization with statistics synchronized across ranks, on GPUs and on CPUs."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsimclr.distributed import sum_over_ranks


class CpuSyncBatchNorm(_BatchNorm):
    """SyncBatchNorm for CPU tensors, which torch's own does not support; in plain operations with exact gradients."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        group = dist.group.WORLD
        assert group is not None
        # Under autocast the statistics are float32, as in torch's batch normalization.
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [d for d in range(x.ndim) if d != 1]
        view = [1, -1] + [1] * (x.ndim - 2)
        count = torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype)
        total = sum_over_ranks(torch.cat([x.sum(dims), count]), group)
        mean, total_count = total[:-1] / total[-1], total[-1].detach()
        centered = x - mean.view(view)
        variance = sum_over_ranks(centered.square().sum(dims), group) / total_count
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            unbiased = variance * (total_count / (total_count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        y = centered * (variance + self.eps).rsqrt().view(view)
        return (y * self.weight.view(view) + self.bias.view(view)).to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any number of dimensions


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Synchronize every BatchNorm of `module` across all ranks; parameters and running statistics are kept."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            child.__class__ = CpuSyncBatchNorm  # type: ignore[assignment]  # replaces only its forward
    return module
