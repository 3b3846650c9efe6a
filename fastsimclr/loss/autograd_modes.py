"""Autograd modes of the loss operators, beyond a first derivative by torch.autograd.

PyTorch differentiates a custom operator only as registered. Modes in which its derivative would silently be zero, or
fail with a message about PyTorch's internals, raise here. vmap calls the operator once per sample.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

_DIFFERENTIATING = (TransformType.Grad, TransformType.Jvp)


def is_in_transform() -> bool:
    """Return whether a torch.func transform is active, in which the host may be unable to read a tensor."""
    return get_interpreter_stack() is not None


def refuse_transforms(backend: str) -> None:
    """Raise RuntimeError in forward-mode AD, and in a torch.func transform that differentiates."""
    if forward_ad._current_level >= 0 or _is_in_differentiating_transform():
        raise RuntimeError(
            f'loss: got backend "{backend}" in forward-mode AD or in a torch.func transform that differentiates '
            '(jvp, grad, jacrev, ...); expected torch.autograd.grad or backward: use these, or backend="reference"'
        )


@torch.compiler.assume_constant_result  # Dynamo cannot trace it, but recompiles when the active transforms change
def _is_in_differentiating_transform() -> bool:
    return any(interpreter.key() in _DIFFERENTIATING for interpreter in get_interpreter_stack() or ())


def define_modes(backend: str, forward: Any, backward: Any) -> None:
    """Register vmap for both operators of a backend, and a derivative of `backward` that raises RuntimeError."""

    def refuse_second_derivative(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(
            f'loss: got a second derivative of backend "{backend}", which has a first one only; use backend="reference"'
        )

    for operator in (forward, backward):
        operator.register_vmap(_loop_over_samples(operator))
    backward.register_autograd(refuse_second_derivative)


def _loop_over_samples(operator: Any) -> Callable[..., tuple[tuple[Tensor, ...], tuple[int, ...]]]:
    def loop(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        pairs = list(zip(arguments, in_dims, strict=True))
        samples = [
            operator(*(x.select(dim, index) if isinstance(dim, int) else x for x, dim in pairs))
            for index in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(of_samples) for of_samples in zip(*samples, strict=True))
        return outputs, (0,) * len(outputs)

    return loop
