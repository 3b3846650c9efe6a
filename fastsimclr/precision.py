"""Select the encoder's precision and record why."""

from typing import NamedTuple

import torch
from torch.amp import GradScaler

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TENSOR_CORES = (7, 0)  # the lowest compute capability with fp16 tensor cores (V100)


class Precision(NamedTuple):
    """The dtypes of an encoder's computation and weights."""

    autocast: torch.dtype | None
    """Dtype of autocast; None: no autocast."""
    dtype: torch.dtype
    """Dtype of the weights."""
    why: str
    """The choice and its reason, for logs."""

    @property
    def name(self) -> str:
        """The precision: "bf16", "fp16", "fp32" or "fp64"."""
        without_autocast = "fp64" if self.dtype == torch.float64 else "fp32"
        return next((name for name, dtype in _AUTOCAST.items() if dtype == self.autocast), without_autocast)

    @property
    def view_dtype(self) -> torch.dtype:
        """Dtype in which a loader delivers views: that of autocast, which saves a conversion."""
        return self.autocast or torch.float32

    def grad_scaler(self, device: torch.device) -> GradScaler:
        """Return a scaler that keeps small gradients from underflowing in float16. Disabled for other precisions."""
        return GradScaler(device.type, enabled=self.autocast == torch.float16)


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """Return the precision for `wanted`: "bf16", "fp16", "fp32", "fp64" or "auto".

    auto: bf16 autocast if the hardware supports it, else fp16 autocast on a GPU with tensor cores, else fp32.
    """
    if wanted == "auto":
        wanted, why = _fastest(device)
    else:
        why = wanted
    return Precision(_AUTOCAST.get(wanted), torch.float64 if wanted == "fp64" else torch.float32, why)


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return a context manager for autocast to `dtype`; disabled if `dtype` is None."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _fastest(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return "bf16", "bf16 autocast (auto: this CPU supports bf16)"
        return "fp32", "fp32 (auto: this CPU does not support bf16)"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "bf16 autocast (auto: this GPU supports bf16)"
    if torch.cuda.get_device_capability(device) >= _TENSOR_CORES:
        return "fp16", "fp16 autocast with scaled gradients (auto: this GPU has fp16 tensor cores, but no bf16)"
    return "fp32", "fp32 (auto: this GPU has neither bf16 nor fp16 tensor cores)"
