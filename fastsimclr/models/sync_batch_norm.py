"""Batch normalization with statistics synchronized across ranks, on GPUs and on CPUs."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from fastsimclr.distributed import all_gather
from fastsimclr.errors import UserError


class _Normalize(torch.autograd.Function):
    """Batch normalization with the mean and variance of all ranks, by PyTorch's CPU kernels: (N, C, ...) -> same.

    Also returns mean, biased variance (C,) and the number of values per channel, without a gradient. The gradient of x
    is that of the sum of all ranks' losses, those of weight and bias are of this rank's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # With running statistics, which stay 0, those of a bf16 input are float32.
        unused = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        mean, variance = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
        count = mean.new_tensor([x.numel() / len(mean)])
        of_ranks = mean.new_empty(dist.get_world_size(group), 2 * len(mean) + 1)
        all_gather(of_ranks, torch.cat([mean, variance, count])[None], group)
        means, variances, counts = of_ranks.split([len(mean), len(mean), 1], dim=1)
        count = counts.sum()
        shares = counts / count
        mean = (shares * means).sum(dim=0)
        # Not the mean of squares minus the square of the mean, which cancels where the mean is large.
        variance = (shares * (variances + (means - mean).square())).sum(dim=0)
        y: Tensor = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # Of the normalization with constants: dx = dy * factor, dweight = sum(dy * x^), dbias = sum(dy).
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            of_ranks = dweight.new_empty(dist.get_world_size(ctx.group), 2 * len(dweight))
            all_gather(of_ranks, torch.cat([dweight, dbias])[None], ctx.group)  # gloo's all-reduce takes longer
            of_normalized, of_one = (of_ranks.sum(dim=0) / count).chunk(2)
            inverse = (variance + ctx.eps).rsqrt()
            factor = inverse if weight is None else inverse * weight
            # dx - factor * (of_one + of_normalized * (x - mean) * inverse); the product by another normalization.
            one = torch.ones_like(mean)
            dx -= torch.native_batch_norm(
                x, factor * inverse * of_normalized, factor * of_one, mean, one, False, 0.0, 0.0
            )[0]
        return dx, dweight if weight is not None else None, dbias if weight is not None else None, None, None


class CpuSyncBatchNorm(_BatchNorm):
    """SyncBatchNorm for CPU tensors, which torch's own does not support. It exchanges one message per pass."""

    process_group: dist.ProcessGroup | None = None
    """The ranks to synchronize; None: all. The name is that of torch's SyncBatchNorm."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        group = self.process_group or dist.group.WORLD
        assert group is not None
        y, mean, variance, count = _Normalize.apply(input, self.weight, self.bias, self.eps, group)
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                # Without a momentum, torch keeps the cumulative mean.
                momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
                unbiased = variance * (count / (count - 1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return y  # type: ignore[no-any-return]

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
