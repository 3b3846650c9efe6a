"""Models divided over the ranks: --distributed fsdp, by PyTorch's `fully_shard`.

Each rank keeps a part of every weight, of its gradient and of the optimizer's state for it. The weights of a block are
whole only while it computes.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_COALESCED_BYTES = 250 * 2**20  # per broadcast


def shard(model: nn.Module) -> None:
    """Divide the weights of rank zero's model over the ranks' models, in place. All ranks must call it.

    The blocks are the modules in an nn.Sequential or nn.ModuleList that have modules of their own, such as residual
    blocks and transformer layers. Each is gathered on its own, and the other weights together. The parameters are new
    objects.
    """
    with torch.no_grad():
        broadcast([*model.parameters(), *model.buffers()])
        for parameter in model.parameters():  # fully_shard divides contiguous tensors only
            parameter.set_(parameter.contiguous())  # type: ignore[call-overload]
    containers = [module for module in model.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    blocks = {child for container in containers for child in container.children() if any(child.children())}
    for module in reversed(list(model.modules())):  # a block before the one that contains it
        if module in blocks and any(not isinstance(p, DTensor) for p in module.parameters()):
            fully_shard(module)
    fully_shard(model)


def template_of(module: nn.Module) -> nn.Module:
    """Return a copy of a module without the memory of its parameters, for `assemble`."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, empty)  # type: ignore[arg-type] # the memo: parameters that are copied already


def assemble(template: nn.Module, sharded: nn.Module) -> nn.Module:
    """Return a whole copy of a sharded module, with the buffers of rank zero. All ranks must call it."""
    state = {name: whole(tensor.detach()).clone() for name, tensor in sharded.state_dict().items()}
    broadcast([state[name] for name, _ in sharded.named_buffers() if name in state])
    assembled = copy.deepcopy(template)
    assembled.load_state_dict(state, assign=True)
    return assembled


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each rank has a part of the tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a whole, and any other tensor as it is. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, which may be empty; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard a tensor that all ranks have, if `other`, of the same shape, is sharded; otherwise return it as it is."""
    if not isinstance(other, DTensor):
        return tensor
    tensor = tensor.to(other.device).contiguous()
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def norms(parts: Sequence[Tensor], of: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the Euclidean norm of each tensor, (T,). If the tensors are sharded, all ranks must call it.

    parts: this rank's part of each. of: one of the tensors, sharded as all of them are.
    dtype: of the result; None: that of the tensors.
    """
    found = torch.stack(torch._foreach_norm(list(parts), 2, dtype=dtype))
    if isinstance(of, DTensor):
        squares = found.double().square()
        dist.all_reduce(squares, group=of.device_mesh.get_group())
        found = squares.sqrt().to(found.dtype)
    return found


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return nested dicts, lists and tuples with `function` of each tensor in its place."""
    if isinstance(value, Mapping):
        mapped = copy.copy(value)  # a module's state dict is an OrderedDict with attributes
        mapped.update({key: map_tensors(function, item) for key, item in value.items()})  # type: ignore[attr-defined]
        return mapped
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, item) for item in value)
    return function(value) if isinstance(value, Tensor) else value


def broadcast(tensors: list[Tensor]) -> None:
    """Copy tensors of rank zero to all ranks."""
    assert dist.group.WORLD is not None
    if tensors:  # of an encoder without buffers there are none
        dist._broadcast_coalesced(dist.group.WORLD, tensors, _COALESCED_BYTES, 0)
