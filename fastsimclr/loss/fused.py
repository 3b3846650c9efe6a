"""The NT-Xent loss with the compiled kernels (csrc/), as PyTorch operators.

The kernels take pointers, sizes and a stream; all memory that they write is allocated here. tiled.py has the equations,
csrc/*.cu explain how the kernels divide the work.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastsimclr import _extension
from fastsimclr._extension import why_unavailable
from fastsimclr.distributed import all_gather_rows, gather_sizes, group_name, group_of, start_gather_rows
from fastsimclr.loss.autograd_modes import define_modes, refuse_transforms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 2048
MAX_ROWS = 2**30  # rows on all ranks, see csrc/nt_xent.h


def unsupported(dtype: torch.dtype, width: int) -> str:
    """Return why the kernels cannot take projections (N, `width`) of `dtype`, or "" if they can."""
    if dtype not in DTYPES:
        return f"got {dtype} projections, expected float32, bfloat16 or float16"
    if width > MAX_WIDTH:
        return f"got projections of {width} features, expected at most {MAX_WIDTH}"
    return ""


def is_available() -> bool:
    """Return whether the fused NT-Xent loss can run: a GPU is available, and the extension's kernels load on it."""
    return torch.cuda.is_available() and not why_unavailable(torch.device("cuda", torch.cuda.current_device()))


def nt_xent_fused(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | None,
    group: dist.ProcessGroup | None,
    mean: bool,
    decoupled: bool,
    precision: str,
    temperature_value: float | None,
) -> Tensor:
    """Arguments and result as in `fastsimclr.nt_xent`.

    temperature: the tensor, if one is given. temperature_value: its value, if known without waiting for a GPU. At least
    one is not None.
    """
    refuse_transforms("fused")
    return fused_forward(z1, z2, temperature, group_name(group), mean, decoupled, precision, temperature_value)[0]


@torch.library.custom_op("fastsimclr::fused_forward", mutates_args=())
def fused_forward(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | None,
    group: str,
    mean: bool,
    decoupled: bool,
    precision: str,
    temperature_value: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and the tensors for the backward pass.

    These are the unit rows (2n, planes, width) in bf16, their norms (2n,), the unit rows of all ranks (M, planes,
    width; empty without a group), the lse of all ranks in bits (M,), q (2n,), and the number of rows on each rank
    (world_size,), on the CPU. Without a group the latter is empty and on z1's device: Inductor makes no CUDA graph of
    an operator with an output on the CPU.
    """
    n, d = z1.shape
    rows, planes, width = 2 * n, planes_of(precision), padded_width(d)
    check_rows(rows)  # before memory is allocated for them
    kernels = Kernels(z1, temperature, temperature_value)
    unit = z1.new_empty(rows, planes, width, dtype=torch.bfloat16)
    norm, positive = kernels.floats(rows), kernels.floats(n)
    kernels(
        "normalize", z1=_view(z1), z2=_view(z2), dtype=kernels.dtype, n=n, d=d, planes=planes, width=width,
        unit=unit.data_ptr(), norm=norm.data_ptr(), positive=positive.data_ptr(),
    )  # fmt: skip

    sizes, offset = [rows], 0
    if group:
        sizes = gather_sizes(rows, group_of(group), z1.device)
        offset = sum(sizes[: dist.get_rank(group_of(group))])
        gathered = start_gather_rows(unit, sizes, group_of(group))  # overlaps with the work on local rows
    total = sum(sizes)
    check_rows(total)
    # Parts of the columns (start, count): the rows of this rank, of the ranks before it and of the ranks after it. Each
    # part writes its sums into its own slots.
    parts = [part for part in ((offset, rows), (0, offset), (offset + rows, total - offset - rows)) if part[1]]
    column_units = [
        kernels.query(
            "forward_column_unit", rows=rows, columns=count, planes=planes, width=width, symmetric=start == offset
        )
        for start, count in parts
    ]
    slots = [-(-count // column_unit) for (_, count), column_unit in zip(parts, column_units, strict=True)]
    sums = kernels.floats(sum(slots), rows)
    all_unit = unit
    for index, ((start, count), column_unit) in enumerate(zip(parts, column_units, strict=True)):
        is_local = start == offset
        if not is_local and all_unit is unit:
            all_unit = gathered()
        kernels(
            "forward", rows=unit.data_ptr(), row_count=rows, columns=(unit if is_local else all_unit[start]).data_ptr(),
            column_count=count, planes=planes, width=width, symmetric=is_local, pairs=(0, n) if is_local else None,
            all_columns=total, **kernels.temperature, column_unit=column_unit, sums=sums[sum(slots[:index])].data_ptr(),
        )  # fmt: skip
    losses, lse, q = kernels.floats(rows), kernels.floats(rows), kernels.floats(rows)
    kernels(
        "losses", sums=sums.data_ptr(), slots=sum(slots), positive=positive.data_ptr(), n=n, all_columns=total,
        decoupled=decoupled, **kernels.temperature, losses=losses.data_ptr(), lse=lse.data_ptr(), q=q.data_ptr(),
    )  # fmt: skip
    if group:
        lse = all_gather_rows(lse, sizes, group_of(group))
    loss = losses.sum() * (len(sizes) / total) if mean else losses
    if not group:
        return loss, unit, norm, unit.new_empty(0, planes, width), lse, q, _no_sizes(z1)
    return loss, unit, norm, all_unit, lse, q, torch.tensor(sizes)


def check_rows(rows: int) -> None:
    if rows > MAX_ROWS:
        raise ValueError(f"got {rows} views on all ranks, expected at most {MAX_ROWS}")


def _no_sizes(z: Tensor) -> Tensor:
    return z.new_empty(0, dtype=torch.int64)


@fused_forward.register_fake
def _(z1, z2, temperature, group, mean, decoupled, precision, temperature_value):  # type: ignore[no-untyped-def]
    n, d = z1.shape
    planes, width = planes_of(precision), padded_width(d)
    rows = torch.library.get_ctx().new_dynamic_size() if group else 2 * n
    sizes = torch.empty(dist.get_world_size(group_of(group)), dtype=torch.int64) if group else _no_sizes(z1)
    return (
        z1.new_empty((() if mean else (2 * n,)), dtype=torch.float32),
        z1.new_empty((2 * n, planes, width), dtype=torch.bfloat16),
        z1.new_empty((2 * n,), dtype=torch.float32),
        z1.new_empty((rows if group else 0, planes, width), dtype=torch.bfloat16),
        z1.new_empty((rows,), dtype=torch.float32),
        z1.new_empty((2 * n,), dtype=torch.float32),
        sizes,
    )


@torch.library.custom_op("fastsimclr::fused_backward", mutates_args=())
def fused_backward(
    dloss: Tensor,
    z1: Tensor,
    z2: Tensor,
    unit: Tensor,
    norm: Tensor,
    all_unit: Tensor,
    lse: Tensor,
    q: Tensor,
    sizes: Tensor,
    temperature: Tensor | None,
    group: str,
    temperature_value: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients dz1 and dz2 (n, D), and ẑ·dẑ of each row (2n,). Other arguments as in fused_forward."""
    n, d = z1.shape
    rows, planes, width = unit.shape
    total = len(lse)
    kernels = Kernels(z1, temperature, temperature_value)
    offset, ranks = 0, 1
    if group:
        offset, ranks = int(sizes[: dist.get_rank(group_of(group))].sum()), len(sizes)
    else:
        all_unit = unit
    weights, local_weights = None, None
    if dloss.ndim == 0:
        scale, factor = dloss, ranks / total
    else:
        # reduction="none": the only case in which the backward pass communicates. The weights are scaled to a maximum
        # of 1, and back at the end: with weights of 1/M, weight / 2^lse would be subnormal.
        weights = all_gather_rows(dloss, sizes.tolist(), group_of(group)) if group else dloss
        scale, factor = weights.abs().amax().clamp_min_(torch.finfo(torch.float32).tiny), 1.0
        weights = weights / scale
        local_weights = weights[offset : offset + rows]

    splits = kernels.query("backward_splits", rows=rows, columns=total, planes=planes, width=width)
    sums = kernels.floats(splits, rows, width)
    kernels(
        "backward", rows=unit.data_ptr(), row_count=rows, columns=all_unit.data_ptr(), column_count=total,
        planes=planes, width=width, pairs=(offset, n), all_columns=total, **kernels.temperature,
        row_losses=(lse[offset:].data_ptr(), _address(local_weights)),
        column_losses=(lse.data_ptr(), _address(weights)), splits=splits, sums=sums.data_ptr(),
    )  # fmt: skip
    dz1, dz2 = (torch.empty(n, d, dtype=z1.dtype, device=z1.device) for _ in range(2))
    z_dot_dz = kernels.floats(rows)
    kernels(
        "project", z1=_view(z1), z2=_view(z2), dtype=kernels.dtype, n=n, d=d, width=width, **kernels.temperature,
        norm=norm.data_ptr(), q=q.data_ptr(), weights=_address(local_weights), scale=scale.data_ptr(), factor=factor,
        sums=sums.data_ptr(), splits=splits, dz1=dz1.data_ptr(), dz2=dz2.data_ptr(), along=z_dot_dz.data_ptr(),
    )  # fmt: skip
    return dz1, dz2, z_dot_dz


@fused_backward.register_fake
def _(dloss, z1, z2, unit, norm, all_unit, lse, q, sizes, temperature, group, temperature_value):  # type: ignore[no-untyped-def]
    dz1, dz2 = (torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (z1, z2))
    return dz1, dz2, torch.empty_like(norm)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z1, z2, temperature, ctx.group, _, _, _, ctx.temperature_value = inputs
    ctx.save_for_backward(z1, z2, *output[1:], temperature)
    ctx.set_materialize_grads(False)  # see tiled.py


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:  # gradcheck calls it without any gradient
        return (None,) * 8
    refuse_transforms("fused")
    *saved, temperature = ctx.saved_tensors
    dz1, dz2, z_dot_dz = fused_backward(dloss, *saved, temperature, ctx.group, ctx.temperature_value)
    dtemperature = None
    if temperature is not None and ctx.needs_input_grad[2]:
        dtemperature = (z_dot_dz.sum().to(temperature) * -0.5) / temperature
    return dz1, dz2, dtemperature, None, None, None, None, None


fused_forward.register_autograd(_backward, setup_context=_setup_context)
define_modes("fused", fused_forward, fused_backward)


class Kernels:
    """The loss kernels of `fastsimclr._C` (on the CPU: `fastsimclr._emulated`) and the arguments of all their calls."""

    def __init__(self, z: Tensor, temperature: Tensor | None, value: float | None) -> None:
        on_gpu = z.device.type == "cuda"
        self._module: Any = _extension.compiled if on_gpu else _extension.emulated
        self.device = (z.device.index or 0) if on_gpu else 0
        self.stream = torch.cuda.current_stream(z.device).cuda_stream if on_gpu else 0
        self.dtype = getattr(self._module.DataType, str(z.dtype).removeprefix("torch."))
        self._like = z
        if value is None and temperature is not None and temperature.device != z.device:
            value = float(temperature)  # it is on the CPU, so this needs no synchronization
        self.value = value
        self._keep = None if value is not None else temperature.to(torch.float32)  # type: ignore[union-attr]
        self.temperature = {"temperature": _address(self._keep), "temperature_value": value or 0.0}
        # The kernels have their own CUDA runtime, so both runtimes set the device; PyTorch restores the previous one.
        self._on_device = torch.cuda.device(z.device) if on_gpu else nullcontext()

    def __call__(self, name: str, **arguments: Any) -> None:
        """Launch kernel nt_xent_`name`."""
        self.query(name, **arguments, stream=self.stream)

    def query(self, name: str, **arguments: Any) -> int:
        """Call a function that launches nothing and returns how the kernels divide the work, to size their buffers."""
        with self._on_device:
            return getattr(self._module, f"nt_xent_{name}")(**arguments, device=self.device)

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self._like.device)


def _view(z: Tensor) -> tuple[int, int, int]:
    return z.data_ptr(), z.stride(0), z.stride(1)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def planes_of(precision: str) -> int:
    """Return how many bf16 numbers represent a factor of the products: their sum has 8 bits (1) or 16 bits (2)."""
    return 2 if precision == "highest" else 1


def padded_width(d: int) -> int:
    return -(-d // 8) * 8  # rows are padded to a multiple of 16 bytes
