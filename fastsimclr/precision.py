"""What the encoder computes in: chosen once, with the reason."""

from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """Autocast to bfloat16 or not, the dtype of the weights, and what was chosen and why."""

    bf16: bool
    dtype: torch.dtype
    why: str


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """wanted: "bf16", "fp32", "fp64", or "auto", which takes bf16 where the hardware has it."""
    if wanted == "auto":
        if device.type == "cuda":
            bf16, why = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
        else:
            bf16, why = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(), "this CPU"
        chosen = f"bf16 autocast (auto: {why} has it)" if bf16 else f"fp32 (auto: {why} has no bf16)"
        return Precision(bf16, torch.float32, chosen)
    return Precision(wanted == "bf16", torch.float64 if wanted == "fp64" else torch.float32, wanted)
