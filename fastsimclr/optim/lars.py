"""LARS: SGD with momentum and a layer-wise adaptive learning rate, with multi-tensor operations.

What is fused and why. On a GPU, a step written per tensor costs about ten kernel launches for each of ResNet-50's 161
tensors. On a CPU, the step is bound by memory traffic, and multi-tensor calls over the whole network double it, as
nothing stays in the cache from one call to the next. So the excluded tensors are updated by three multi-tensor calls,
and the adapted ones in parts: g = grad + weight_decay·w of a part is computed in a scratch buffer, which on a CPU is
still in the cache for its norm and for the update. On a GPU only addcmul, which has a rate per tensor, launches a
kernel per tensor.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsimclr.sharding import local, norms

# Elements per part. CPU: scratch, w, g and v of a part fit in a last-level cache of 16 MiB or more (measured on
# ResNet-50: 2^20 18 ms, 2^22 25 ms, all at once 30 ms). GPU: the launches dominate, so all of ResNet-50 is one part.
_PART_NUMEL_CPU = 1 << 20
_PART_NUMEL = 1 << 25


def is_norm_or_bias(parameter: Tensor) -> bool:
    """Return whether `parameter` is a norm's scale or shift or a bias: a tensor of at most one dimension.

    SimCLR excludes these from weight decay and adaptation. A rule on names would miss ResNet's `downsample.1`, a
    BatchNorm without "bn" in its name.
    """
    return parameter.ndim <= 1


class LARS(Optimizer):
    """LARS optimizer: layer-wise adaptive rate scaling, as used by SimCLR (You et al., arXiv 1708.03888).

    For every parameter w with gradient grad and momentum buffer v, initially 0:
        g = grad + weight_decay · w
        r = trust_coefficient · ‖w‖ / ‖g‖ if both norms are > 0, else 1
        v ← momentum · v + lr · r · g       (v contains lr, so a change of lr acts with the momentum's delay)
        w ← w − v
    Parameters for which `exclude` returns True use g = grad and r = 1. This is `lars_optimizer.py` of
    google-research/simclr with its classic momentum. The LARS paper has ‖grad‖ + weight_decay · ‖w‖ in place of ‖g‖.

    params: parameters or param groups; any shape, real floating point, strided.
    lr: learning rate, a float. trust_coefficient: scale of the adaptive rate r.
        lr, momentum, weight_decay and trust_coefficient can be set per group and changed between steps.
    exclude: function of a parameter; by default True for tensors of at most one dimension (norms and biases).

    As in PyTorch's fused optimizers, a step changes nothing if the attribute `found_inf`, a float32 tensor on the GPU,
    is 1. With that attribute the update is one fused kernel, which rounds differently.

    Parameters without a gradient are not updated. A step never synchronizes with the device and does not modify p.grad.
    On a CPU the optimizer holds a scratch buffer per dtype, of 2^20 elements or the size of the largest adapted tensor;
    it is not part of the state_dict.
    Raises ValueError for a hyperparameter out of range and for sparse or complex gradients.
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
            raise ValueError(f"exclude is {exclude!r}, expected a function from a parameter to a bool")
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
        """Add a param group; its hyperparameters default to the constructor's. Raises ValueError if one is invalid."""
        super().add_param_group(param_group)
        try:
            _check_hyperparameters(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()  # a caller that catches this must not train with an invalid group
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a LARS optimizer. Raises ValueError for that of another optimizer or other parameters."""
        for group in state_dict["param_groups"]:
            if missing := sorted(self.defaults.keys() - group.keys()):
                raise ValueError(
                    f"state_dict: got a param group without {', '.join(missing)}, expected the state of a LARS "
                    "optimizer; start without the state of another optimizer"
                )
            _check_hyperparameters(group)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "exclude": self.exclude,
        }  # for copy and pickle: the base class saves only its own attributes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch = {}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. `closure`, if given, is evaluated first; returns its loss."""
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
        weights, grads, velocities = self._parts_here(params)
        if self._found_inf() is not None:
            self._update_unless_found_inf(weights, torch._foreach_mul(grads, group["lr"]), velocities, group)
            return
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, grads, alpha=group["lr"])
        torch._foreach_sub_(weights, velocities)

    def _update_adapted(self, params: list[Tensor], group: dict[str, Any]) -> None:
        weights, grads, velocities = self._parts_here(params)
        if group["weight_decay"] != 0:
            scratch = self._scratch_like(weights)
            torch._foreach_copy_(scratch, grads)
            torch._foreach_add_(scratch, weights, alpha=group["weight_decay"])
            grads = scratch
        # A float16 norm would overflow at 65504; bfloat16 would round the rate to 8 bits.
        norm_dtype = torch.promote_types(weights[0].dtype, torch.float32)
        w_norms, g_norms = norms([*weights, *grads], params[0], norm_dtype).chunk(2)  # (T,)
        nonzero = (w_norms > 0) & (g_norms > 0)
        rates = torch.where(nonzero, group["trust_coefficient"] * w_norms / g_norms, 1.0) * group["lr"]  # (T,)
        if self._found_inf() is not None:
            self._update_unless_found_inf(weights, torch._foreach_mul(grads, rates.unbind()), velocities, group)
            return
        torch._foreach_mul_(velocities, group["momentum"])
        # The rates stay tensors, as .item() would synchronize with the GPU; addcmul takes them without a temporary.
        torch._foreach_addcmul_(velocities, grads, rates.unbind())
        torch._foreach_sub_(weights, velocities)

    def _found_inf(self) -> Tensor | None:
        return getattr(self, "found_inf", None)

    def _update_unless_found_inf(
        self, weights: list[Tensor], scaled: Sequence[Tensor], velocities: list[Tensor], group: dict[str, Any]
    ) -> None:
        """v ← momentum · v + scaled, w ← w − v, in the kernel of SGD, which checks `found_inf` on the device."""
        torch._fused_sgd_(
            weights,
            list(scaled),
            velocities if group["momentum"] != 0 else [],  # without it the kernel takes none
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=1.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=self._found_inf(),
        )

    def _parts_here(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the parameters, their gradients and their velocities: this rank's parts of sharded ones."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        velocities = [local(self.state[p]["momentum_buffer"]) for p in params]
        return [local(p) for p in params], [local(p.grad) for p in params if p.grad is not None], velocities

    def _scratch_like(self, params: list[Tensor]) -> list[Tensor]:
        """Return views of one uninitialized buffer with the shapes and strides of `params` (one device and dtype)."""
        numel = sum(p.numel() for p in params)
        device, dtype = params[0].device, params[0].dtype
        if device.type != "cpu":  # the caching allocator reuses the same block at every step
            buffer = torch.empty(numel, device=device, dtype=dtype)
        else:
            if dtype not in self._scratch or self._scratch[dtype].numel() < numel:
                self._scratch[dtype] = torch.empty(numel, dtype=dtype)
            buffer = self._scratch[dtype]
        views, start = [], 0
        for p in params:
            # With the strides of p (channels-last weights), the multi-tensor kernels treat both as flat memory.
            extent = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            flat = buffer[start : start + p.numel()]
            views.append(flat.as_strided(p.shape, p.stride()) if extent == p.numel() else flat.view(p.shape))
            start += p.numel()
        return views


def _by_device_and_dtype(params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Group the parameters that have a gradient by device and dtype, as the multi-tensor kernels require.

    Raises ValueError for sparse or complex gradients.
    """
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
    """Yield consecutive runs of `params` that hold at most a part's number of elements, or one larger tensor."""
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
    bounds = {  # name: (check, description of the range)
        "lr": (lambda x: 0 <= x < math.inf, "a finite float >= 0"),
        "momentum": (lambda x: 0 <= x < 1, "a float in [0, 1)"),
        "weight_decay": (lambda x: 0 <= x < math.inf, "a finite float >= 0"),
        "trust_coefficient": (lambda x: 0 < x < math.inf, "a finite float > 0"),
    }
    for name, (in_range, expected) in bounds.items():
        value = group[name]
        # Tensors are rejected: the multi-tensor kernels would read them on the host at every step.
        if isinstance(value, bool | Tensor) or not isinstance(value, int | float) or not in_range(value):
            raise ValueError(f"{name} is {value!r}, expected {expected}: pass {name}=... within that range to LARS")
