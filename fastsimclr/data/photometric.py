"""Photometric augmentation of a batch: color jitter, grayscale, blur, solarize and normalize.

The operations are torchvision's for uint8 tensors (transforms.v2.functional), clamped and truncated to integer levels
after every operation like those, but on a batch in which every image has its own factors and order.

The compiled extension implements it on CPUs and GPUs (csrc/photometric.*). The PyTorch implementation replaces it if it
is not available, and tests compare against it.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.data import native
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.params import ViewParams

_LUMA_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, rounded as in torchvision
_CHUNK = 16  # images at a time on a CPU: a few MB of floats, which fit in the cache
_COMPILED = (torch.float32, torch.bfloat16, torch.float16)


def photometric(
    crops: Tensor,
    params: ViewParams,
    recipe: Augmentation,
    dtype: torch.dtype = torch.float32,
    implementation: native.Implementation = "auto",
) -> Tensor:
    """Apply the photometric augmentation to crops (B, H, W, 3) uint8; return views (B, 3, H, W) in `dtype`.

    The views are normalized and channels-last, on the device of the crops.
    params: (B,), the sampled parameters of the view. recipe: the recipe of the view, from `Augmentation.recipes`.
    """
    device, (images, height, width) = crops.device, crops.shape[:3]
    implementation = native.choose(implementation, device)
    max_sigma = float(params["sigma"].max(initial=0))
    on_gpu = implementation == "emulated" or (implementation == "compiled" and device.type == "cuda")
    if on_gpu and min(blur_window(recipe) // 2, math.ceil(4 * max_sigma)) > native.constant("MAX_BLUR_RADIUS"):
        implementation = "pytorch"  # the blur is too wide for the kernel's shared memory
    if implementation == "pytorch" or dtype not in _COMPILED:
        return photometric_in_pytorch(crops, params, recipe, dtype)
    crops = crops.contiguous()
    params_on_device = native.on_device(params.view(np.uint8), device)
    out = _empty(images, height, width, dtype, device)
    arguments = {
        "crops": crops.data_ptr(),
        "view_params": params_on_device.data_ptr(),
        "images": images,
        "height": height,
        "width": width,
        "blur_taps": blur_window(recipe),
        "scale": [1 / (255 * std) for std in recipe.std],
        "shift": [-mean / std for mean, std in zip(recipe.mean, recipe.std, strict=True)],
        "dtype": native.pixel_type(dtype, implementation),
        "out": out.data_ptr(),
    }
    if on_gpu:
        parts = torch.empty(images, native.constant("LUMA_PARTS"), device=device)
        native.launch("photometric", device, **arguments, parts=parts.data_ptr(), max_sigma=max_sigma)
    else:
        native.call("photometric", **arguments, threads=torch.get_num_threads())
    return out


def _empty(images: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate views (images, 3, height, width), channels-last."""
    if device.type == "cpu":
        # Allocated by NumPy with malloc. PyTorch uses posix_memalign, which in glibc before 2.38 rarely reuses freed
        # blocks: with batches of 37 MB, of which two are in use, the process held seven.
        out = torch.from_numpy(np.empty((images, height, width, 3), f"i{dtype.itemsize}")).view(dtype)
    else:
        out = torch.empty((images, height, width, 3), dtype=dtype, device=device)
    return out.permute(0, 3, 1, 2)


def photometric_in_pytorch(crops: Tensor, params: ViewParams, recipe: Augmentation, dtype: torch.dtype) -> Tensor:
    """Compute `photometric` with PyTorch operations, on any device."""
    images, height, width = crops.shape[:3]
    out = _empty(images, height, width, dtype, crops.device)
    mean = torch.tensor(recipe.mean, device=crops.device).view(3, 1, 1) * 255
    std = torch.tensor(recipe.std, device=crops.device).view(3, 1, 1) * 255
    chunk = _CHUNK if crops.device.type == "cpu" else len(crops)
    for first in range(0, len(crops), max(1, chunk)):
        part = slice(first, first + chunk)
        x = crops[part].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        x = _color(x, params[part], recipe)
        out[part] = x.sub_(mean).div_(std)
    return out


def _color(x: Tensor, params: ViewParams, recipe: Augmentation) -> Tensor:
    """Apply all but normalize to x (B, 3, H, W), float32 with integer levels 0 to 255, contiguous; may modify x."""
    for step in range(4):
        for change, apply in enumerate((_brightness, _contrast, _saturation, _hue)):
            selected = params["jitter"] & (params["order"][:, step] == change)
            factor = params["factors"][:, change]
            if change == 3:
                selected = selected & (factor != 0)
            _apply_to(x, selected, apply, factor)
    sigma, window = params["sigma"], blur_window(recipe)
    _apply_to(x, params["grayscale"], lambda part, _: _luma(part).floor_().expand_as(part), sigma)
    _apply_to(x, sigma > 0, lambda part, sigma: _blur(part, sigma, window), sigma)
    _apply_to(x, params["solarize"], lambda part, _: torch.where(part >= 128, 255 - part, part), sigma)
    return x


def _apply_to(
    x: Tensor, selected: np.ndarray, apply: Callable[[Tensor, Tensor], Tensor], parameter: np.ndarray
) -> None:
    """Compute x[selected] = apply(x[selected], parameter[selected]), the parameter as (b, 1, 1, 1)."""
    rows = np.flatnonzero(selected)
    if len(rows) == 0:
        return
    values = torch.from_numpy(parameter[rows].astype(np.float32)).to(x.device, non_blocking=True).view(-1, 1, 1, 1)
    if len(rows) == len(x):
        x.copy_(apply(x, values))
        return
    index = torch.from_numpy(rows).to(x.device, non_blocking=True)
    x.index_copy_(0, index, apply(x.index_select(0, index), values))


def _luma(x: Tensor) -> Tensor:
    """Return gray levels (B, 1, H, W), not rounded."""
    r, g, b = x.unbind(1)
    return (r * _LUMA_WEIGHTS[0]).add_(g, alpha=_LUMA_WEIGHTS[1]).add_(b, alpha=_LUMA_WEIGHTS[2]).unsqueeze(1)


def _levels(x: Tensor) -> Tensor:
    return x.clamp_(0, 255).floor_()


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _levels(x * factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(x).floor_().mean((1, 2, 3), keepdim=True)
    return _levels(torch.addcmul(mean * (1 - factor), x, factor))


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _levels(torch.addcmul(_luma(x).floor_() * (1 - factor), x, factor))


def _hue(x: Tensor, hue_shift: Tensor) -> Tensor:
    """Shift the hue in HSV by `hue_shift` (B, 1, 1, 1), as a fraction of the color circle."""
    x = x / 255
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = value - low
    safe = torch.where(spread == 0, 1.0, spread)
    r, g, b = x.split(1, 1)
    sixths = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )  # sixths of the color circle; 0 for gray
    sixths = torch.where(spread == 0, 0.0, sixths).add_(hue_shift * 6)
    # HSV to RGB in closed form: channel c is value - spread * clamp(min(k, 4 - k), 0, 1), k = (n_c + sixths) mod 6
    n = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)
    k = (n + sixths).remainder_(6)
    rgb = value - spread * torch.minimum(k, 4 - k).clamp_(0, 1)
    return rgb.mul_(255 + 1 - 1e-3).floor_()  # torchvision's conversion from float to uint8


def blur_window(recipe: Augmentation) -> int:
    """Return the size of the blur kernel in pixels: odd, and at least 3, as 1 would not blur."""
    return max(3, int(recipe.image_size * recipe.blur_kernel) // 2 * 2 + 1)


def _blur(x: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Apply a separable Gaussian blur, with reflection at the borders. sigma: (B, 1, 1, 1) in pixels."""
    b, c, h, w = x.shape
    taps = min(taps, 2 * min(h, w) - 1)  # reflection padding must be smaller than the image
    offset = torch.arange(taps, device=x.device) - (taps - 1) / 2
    kernel = torch.exp(-0.5 * (offset / sigma.view(b, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # (B C, taps)
    planes = F.pad(x, (taps // 2,) * 4, mode="reflect").view(1, b * c, h + taps - 1, w + taps - 1)
    planes = F.conv2d(planes, kernel.view(b * c, 1, taps, 1), groups=b * c)
    planes = F.conv2d(planes, kernel.view(b * c, 1, 1, taps), groups=b * c)
    return planes.view(b, c, h, w).round_()
