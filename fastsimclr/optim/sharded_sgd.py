"""SGD of sharded parameters."""

from typing import Any

import torch

from fastsimclr.sharding import local


class ShardedSGD(torch.optim.SGD):
    """torch.optim.SGD for sharded parameters, which PyTorch's fused SGD does not support.

    As in PyTorch's fused optimizers, a step changes nothing if the attribute `found_inf`, a float32 tensor, is 1. The
    momentum buffers must exist before the first step. There is no dampening.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update this rank's part of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            buffers: Any = [self.state[p]["momentum_buffer"] for p in params] if group["momentum"] else []
            torch._fused_sgd_(
                list(map(local, params)),
                [local(p.grad) for p in params],
                list(map(local, buffers)),
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,
                found_inf=getattr(self, "found_inf", None),
            )
