"""Muon: orthogonalized momentum for weights, which needs fewer steps than AdamW to reach the same loss."""

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from fastsimclr.optim.lars import is_norm_or_bias
from fastsimclr.precision import choose_precision
from fastsimclr.sharding import local, sharded_like, whole

# Coefficients of the quintic iteration, of Jordan et al.: singular values between 0.7 and 1.2 after five steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_RMS = 0.2  # of an update of AdamW, as measured by Liu et al., arXiv 2502.16982, section 2.2
_BETA2, _EPS = 0.999, 1e-8


class Muon(Optimizer):
    """Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) for weights, AdamW for all other parameters.

    A weight (out, in, ...) is a matrix W (out, in * kernel). Its update is the Nesterov momentum of the gradient G with
    all singular values set to about 1, scaled to the root mean square of AdamW's updates (arXiv 2502.16982):

        M <- momentum M + (1 - momentum) G;  U = orthogonalize(momentum M + (1 - momentum) G)
        W <- W - lr (0.2 sqrt(max(rows, columns)) U + weight_decay W)

    Learning rates are therefore of AdamW's size. torch.optim.Muon has the same update, for matrices only. Columns whose
    gradient is always zero do not count: in a convolution whose input is smaller than its kernel, most taps see only
    padding.

    params: parameters. Vectors, and those that `exclude` selects (default: norms and biases), are updated by AdamW
        without weight decay.
    lr, momentum (also AdamW's beta1), weight_decay: as in torch.optim.AdamW.
    Raises ValueError if there is no parameter, or for values out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        exclude: Callable[[Tensor], bool] = is_norm_or_bias,
    ) -> None:
        if not (0 <= lr < math.inf and 0 <= momentum < 1 and 0 <= weight_decay < math.inf):
            raise ValueError(
                f"got lr {lr}, momentum {momentum} and weight_decay {weight_decay}, expected finite numbers >= 0, and "
                "a momentum below 1"
            )
        params = list(params)
        if not params:
            raise ValueError("params: got an empty list, expected at least one parameter")
        others = [p for p in params if p.ndim < 2 or exclude(p)]
        others_ids = {id(p) for p in others}
        groups = [
            {"params": [p for p in params if id(p) not in others_ids], "matrices": True, "weight_decay": weight_decay},
            # fused: load_state_dict then moves the step counts to the device, where AdamW's kernel expects them.
            {"params": others, "matrices": False, "weight_decay": 0.0, "fused": True},
        ]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. `closure`, if given, is evaluated first; returns its loss.

        As in PyTorch's fused optimizers, a step changes nothing if the attribute `found_inf`, a float32 tensor on the
        GPU, is 1.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._update_matrices if group["matrices"] else self._update_others)(params, group)
        return loss

    def _update_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        momentum, found_inf = group["momentum"], getattr(self, "found_inf", None)
        # Matrices of the same shape share the launches of a batch: (parameter, its update, used columns).
        by_shape: dict[Any, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for p in params:
            assert p.grad is not None
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffer, grad = local(self.state[p]["momentum_buffer"]), local(p.grad)
            if found_inf is None:
                buffer.lerp_(grad, 1 - momentum)
            else:
                buffer.copy_(torch.where(found_inf.bool(), buffer, buffer.lerp(grad, 1 - momentum)))
            update = _as_matrix(whole(p.grad.lerp(self.state[p]["momentum_buffer"], momentum)), p)
            used = update.any(dim=0)
            if p.device.type == "cpu" and not used.all():  # on a GPU the host would wait for the number of columns
                update = update[:, used]
            by_shape.setdefault((update.shape, p.device, p.dtype), []).append((p, update, used))
        for members in by_shape.values():
            orthogonal = orthogonalize(torch.stack([update for _, update, _ in members]))
            for (p, _, used), u in zip(members, orthogonal, strict=True):
                if u.shape[1] < len(used):
                    u = u.new_zeros(len(u), len(used)).index_copy_(1, used.nonzero()[:, 0], u)
                rate = group["lr"] * _RMS * used.sum().clamp(min=len(p)).sqrt().to(p.dtype)
                if found_inf is not None:
                    rate = torch.where(found_inf.bool(), 0.0, rate)
                    u = u.nan_to_num_(0.0)  # 0 * NaN is NaN
                weight = local(p)
                if group["weight_decay"]:
                    decay = group["lr"] * group["weight_decay"]
                    weight.mul_(1 - decay if found_inf is None else 1 - decay * (1 - found_inf).to(p.dtype))
                weight.addcmul_(local(sharded_like(_as_weight(u, p), p)), rate, value=-1)

    def _update_others(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if "step" not in self.state[p]:
                self.state[p] |= {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
                self.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],  # of AMSGrad
            [state["step"] for state in states],
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["momentum"],
            beta2=_BETA2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=_EPS,
            maximize=False,
        )


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices (B, rows, columns) with singular values near 1, and those of the zero matrix 0.

    By five steps of a Newton-Schulz iteration, for float32 in bf16 where the device multiplies it faster.
    """
    has_bf16 = choose_precision("auto", matrices.device).autocast == torch.bfloat16
    x = matrices.bfloat16() if has_bf16 and matrices.dtype == torch.float32 else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / norms.clamp_min(1e-20).to(x.dtype)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if tall else x).to(matrices.dtype)


def _as_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """Return x, of the shape (out, in, ...) of a weight, as a matrix (out, in * kernel).

    The columns have the order of the weight's memory, so that x, in the same order, is not copied.
    """
    return (x.movedim(1, 3) if _is_channels_last(weight) else x).flatten(1)


def _as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
    """Undo `_as_matrix`."""
    if not _is_channels_last(weight):
        return matrix.reshape(weight.shape)
    rows, columns, height, width = weight.shape
    return matrix.reshape(rows, height, width, columns).movedim(3, 1)


def _is_channels_last(weight: Tensor) -> bool:
    return weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
