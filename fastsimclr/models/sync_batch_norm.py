"""Batch normalization with statistics synchronized across ranks, on GPUs and on CPUs."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsimclr.distributed import sum_over_ranks
from fastsimclr.errors import UserError


class CpuSyncBatchNorm(_BatchNorm):
    """SyncBatchNorm for CPU tensors, which torch's own does not support; in plain operations with exact gradients."""

    process_group: dist.ProcessGroup | None = None
    """The ranks to synchronize; None: all. The name is that of torch's SyncBatchNorm."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        group = self.process_group or dist.group.WORLD
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
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                # Without a momentum, torch keeps the cumulative mean.
                momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
                unbiased = variance * (total_count / (total_count - 1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        y = centered * (variance + self.eps).rsqrt().view(view)
        if self.affine:
            y = y * self.weight.view(view) + self.bias.view(view)
        return y.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any number of dimensions


class CpuSyncBatchNormAct(CpuSyncBatchNorm):
    """CpuSyncBatchNorm of timm's BatchNormAct2d, which has a dropout and an activation after the normalization."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(input)))
        return y


def synchronize_batch_norm(
    module: nn.Module, device: torch.device, group: dist.ProcessGroup | None = None
) -> nn.Module:
    """Synchronize every batch normalization of `module` across ranks; parameters and statistics are kept.

    group: the ranks; None: all.
    Raises UserError for a subclass of torch's batch normalization with a forward of its own, which would be lost. That
    of timm's BatchNormAct2d is kept.
    """
    layers = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    for layer in layers:
        if not (_is_timm_norm_act(layer) or type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)):
            raise UserError(
                f"--model.sync_bn: got a {type(layer).__name__} with a forward of its own, which cannot be "
                "synchronized across ranks; expected nn.BatchNorm1d to 3d: use --model.sync_bn false"
            )
    if device.type == "cpu":
        for layer in layers:  # replace only its forward
            layer.__class__ = CpuSyncBatchNormAct if _is_timm_norm_act(layer) else CpuSyncBatchNorm
            layer.process_group = group  # type: ignore[assignment]
        return module
    if not any(map(_is_timm_norm_act, layers)):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    from timm.layers import convert_sync_batchnorm  # torch's would drop the activations

    return convert_sync_batchnorm(module, group)


def _is_timm_norm_act(layer: nn.Module) -> bool:
    kinds = {(kind.__module__, kind.__name__) for kind in type(layer).mro()}
    return ("timm.layers.norm_act", "BatchNormAct2d") in kinds
