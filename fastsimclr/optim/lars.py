"""LARS: SGD with momentum and a rate of its own for every layer, in multi-tensor steps.

What is fused and why. A step written per tensor costs about ten kernel launches for each of ResNet-50's 161 tensors on
a GPU; on a CPU it is bound by memory traffic, and multi-tensor calls over the whole network double that, as nothing
stays in the cache from one call to the next. So the excluded tensors are updated by three multi-tensor calls, and the
adapted ones in parts: a part's g = grad + weight_decay·w is formed in a scratch buffer, where on a CPU its norm and the
update find it in the cache. Only addcmul, with a rate for each tensor, is a launch for each on a GPU.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

# Elements of one part. CPU: scratch, w, g and v of a part stay within a last-level cache of 16 MiB or more (measured on
# ResNet-50: 2^20 18 ms, 2^22 25 ms, all at once 30 ms). Elsewhere launches are what costs: ResNet-50 is one part.
_PART_NUMEL_CPU = 1 << 20
_PART_NUMEL = 1 << 25


def is_norm_or_bias(parameter: Tensor) -> bool:
    """True for scales, shifts and biases, which SimCLR neither decays nor adapts: tensors of at most one dimension.

    By shape, not by name: a rule on names misses ResNet's `downsample.1`, a BatchNorm without "bn" in its name.
    """
    return parameter.ndim <= 1


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, as SimCLR trains with it (You et al., arXiv 1708.03888; SimCLR, section 2.2).

    For every tensor w with gradient grad and momentum buffer v, which starts at 0:
        g = grad + weight_decay · w
        r = trust_coefficient · ‖w‖ / ‖g‖ if both norms are > 0, else 1
        v ← momentum · v + lr · r · g       (lr inside: a change of lr reaches the buffer with the momentum's delay)
        w ← w − v
    Tensors for which `exclude` is true take g = grad and r = 1. That is `lars_optimizer.py` of google-research/simclr
    with its classic momentum. The LARS paper has ‖grad‖ + weight_decay · ‖w‖ in place of ‖g‖, and so have other ports.

    params: tensors or param groups, any shape, real floating point, strided. lr, momentum, weight_decay and
    trust_coefficient may be set per group and changed between steps; lr is a float. Parameters without a gradient are
    left alone. A step never waits for the device and leaves p.grad as it is. On a CPU the optimizer holds one scratch
    buffer of 2^20 elements, or of the largest adapted tensor, per dtype; it is not part of the state_dict.
    Raises ValueError for a hyper-parameter out of range and for sparse or complex gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 1e-3,
        exclude: Callable[[Tensor], bool] = is_norm_or_bias,
    ) -> None:
        if not callable(exclude):
            raise ValueError(f"exclude is {exclude!r}, expected a function of a parameter that returns a bool")
        self.exclude = exclude
        self._scratch: dict[torch.dtype, Tensor] = {}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose hyper-parameters default to the constructor's; checks them all."""
        super().add_param_group(param_group)
        try:
            _check_hyperparameters(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()  # so that a caller who catches this does not train with half a group
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "exclude": self.exclude}  # for copy and pickle: the base class names its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch = {}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns the loss of `closure`, which is evaluated first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _by_device_and_dtype(group["params"]):
                self._update_excluded([p for p in params if self.exclude(p)], group)
                adapted = [p for p in params if not self.exclude(p)]
                for part in _parts(adapted):
                    self._update_adapted(part, group)
        return loss

    def _update_excluded(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        velocities = self._velocities(params)
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, _gradients(params), alpha=group["lr"])
        torch._foreach_sub_(params, velocities)

    def _update_adapted(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = _gradients(params)
        if group["weight_decay"] != 0:
            scratch = self._scratch_like(params)
            torch._foreach_copy_(scratch, grads)
            torch._foreach_add_(scratch, params, alpha=group["weight_decay"])
            grads = scratch
        # float16 would overflow at a norm of 65504, bfloat16 would round the rate to 8 bits.
        norm_dtype = torch.promote_types(params[0].dtype, torch.float32)
        w_norms = torch.stack(torch._foreach_norm(params, 2, dtype=norm_dtype))  # (T,)
        g_norms = torch.stack(torch._foreach_norm(grads, 2, dtype=norm_dtype))  # (T,)
        usable = (w_norms > 0) & (g_norms > 0)
        rates = torch.where(usable, group["trust_coefficient"] * w_norms / g_norms, 1.0) * group["lr"]  # (T,)
        velocities = self._velocities(params)
        torch._foreach_mul_(velocities, group["momentum"])
        # The rates stay tensors (.item() would be a CPU-GPU sync point); addcmul takes them without a temporary.
        torch._foreach_addcmul_(velocities, grads, rates.unbind())
        torch._foreach_sub_(params, velocities)

    def _velocities(self, params: list[Tensor]) -> list[Tensor]:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [self.state[p]["momentum_buffer"] for p in params]

    def _scratch_like(self, params: list[Tensor]) -> list[Tensor]:
        """Views of one uninitialised buffer with the shapes and strides of `params`, all of one device and dtype."""
        numel = sum(p.numel() for p in params)
        device, dtype = params[0].device, params[0].dtype
        if device.type != "cpu":  # the caching allocator hands out the same block at every step: nothing to keep
            buffer = torch.empty(numel, device=device, dtype=dtype)
        else:
            if dtype not in self._scratch or self._scratch[dtype].numel() < numel:
                self._scratch[dtype] = torch.empty(numel, dtype=dtype)
            buffer = self._scratch[dtype]
        views, start = [], 0
        for p in params:
            # With p's own strides (channels-last weights) the multi-tensor kernels run over both as over flat memory.
            extent = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            flat = buffer[start : start + p.numel()]
            views.append(flat.as_strided(p.shape, p.stride()) if extent == p.numel() else flat.view(p.shape))
            start += p.numel()
        return views


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _by_device_and_dtype(params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Parameters that have a gradient, grouped as the multi-tensor kernels want them; refuses what they cannot take."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided or not p.grad.dtype.is_floating_point:
            raise ValueError(
                f"got a gradient of layout {p.grad.layout} and dtype {p.grad.dtype} for a parameter of shape "
                f"{tuple(p.shape)}, LARS expects dense real ones: use sparse=False, or another optimizer for it"
            )
        groups.setdefault((p.device, p.dtype), []).append(p)
    return groups.values()


def _parts(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive runs of `params` of at most a part's elements, or of one larger tensor."""
    part: list[Tensor] = []
    numel = 0
    for p in params:
        limit = _PART_NUMEL_CPU if p.device.type == "cpu" else _PART_NUMEL
        if part and numel + p.numel() > limit:
            yield part
            part, numel = [], 0
        part.append(p)
        numel += p.numel()
    if part:
        yield part


def _check_hyperparameters(group: dict[str, Any]) -> None:
    bounds = {  # name: (is it in range?, the range in words)
        "lr": (lambda x: 0 <= x < math.inf, "a finite float >= 0"),
        "momentum": (lambda x: 0 <= x < 1, "a float in [0, 1)"),
        "weight_decay": (lambda x: 0 <= x < math.inf, "a finite float >= 0"),
        "trust_coefficient": (lambda x: 0 < x < math.inf, "a finite float > 0"),
    }
    for name, (in_range, expected) in bounds.items():
        value = group[name]
        # A tensor is refused too: the multi-tensor kernels would have to read it on the host at every step.
        if isinstance(value, bool | Tensor) or not isinstance(value, int | float) or not in_range(value):
            raise ValueError(f"{name} is {value!r}, expected {expected}: pass {name}=... within that range to LARS")
