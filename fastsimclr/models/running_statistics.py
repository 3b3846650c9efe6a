"""The running statistics of batch normalization in micro-batches and recomputed passes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def discarded_statistics(model: nn.Module) -> Iterator[None]:
    """Discard what forward passes in the block add to the running statistics. They normalize as outside it.

    The block sees copies of the buffers. Autograd would notice a change of the buffers themselves, and a layer with
    track_running_stats=False saves fewer tensors, which activation checkpointing reports as an error.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.training]
    buffers = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        for name, buffer in norm._buffers.items():
            norm._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for norm, kept in zip(norms, buffers, strict=True):
            norm._buffers.update(kept)


@contextmanager
def divided_momentum(model: nn.Module, parts: int) -> Iterator[None]:
    """Have `parts` forward passes in the block move the running statistics together as far as one outside it.

    A momentum m becomes 1 - (1 - m)^(1/parts), so that 1 - m of the old statistics remains. A cumulative mean (momentum
    None) weighs all passes alike.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.momentum is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        assert norm.momentum is not None
        norm.momentum = 1 - (1 - norm.momentum) ** (1 / parts)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
