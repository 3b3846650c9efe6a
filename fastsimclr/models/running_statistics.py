"""Passes that leave the running statistics of batch normalization as they are."""

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
