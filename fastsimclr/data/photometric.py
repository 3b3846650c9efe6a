"""Photometric augmentation of a batch: color jitter, gain, grayscale, blur, solarize, normalize and channel drop.

The operations are torchvision's (transforms.v2.functional), but on a batch in which every image has its own factors and
order. On 8-bit RGB they are those for uint8 tensors, clamped and truncated to integer levels after every operation. On
floats from 0 to 1 they are only clamped, and the images may have any number of channels: contrast is about the mean
luma of RGB, and about the mean of all channels otherwise.

The compiled extension implements it on CPUs, and for 8-bit RGB on GPUs (csrc/photometric.*). The PyTorch implementation
replaces it elsewhere, and tests compare against it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.data import native
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.params import ViewParams

_LUMA_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, rounded as in torchvision
_NEUTRAL = {2: 1.0, 3: 0.0}  # factors of saturation and hue that change nothing
_CHUNK = 16  # images at a time on a CPU: a few MB of floats, which fit in the cache
_COMPILED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Scale:
    """The values of an image: integer levels from 0 to 255, or floats from 0 to 1."""

    peak: float
    is_integer: bool

    def clamp(self, x: Tensor) -> Tensor:
        return self.truncate(x.clamp_(0, self.peak))

    def truncate(self, x: Tensor) -> Tensor:
        return x.floor_() if self.is_integer else x


_LEVELS, _UNIT = _Scale(255, True), _Scale(1, False)


def photometric(
    crops: Tensor,
    params: ViewParams,
    recipe: Augmentation,
    dtype: torch.dtype = torch.float32,
    implementation: native.Implementation = "auto",
) -> Tensor:
    """Apply the photometric augmentation to crops (B, H, W, C); return views (B, C, H, W) in `dtype`.

    The views are normalized and channels-last, on the device of the crops.
    crops: RGB uint8, or float32 in [0, 1] with any number of channels.
    params: (B,), the sampled parameters of the view. recipe: the recipe of the view, from `Augmentation.recipes`.
    """
    if crops.dtype == torch.uint8 and (recipe.gain > 0 or recipe.channel_drop_prob > 0):
        crops = crops.float() / 255
    device, (images, height, width) = crops.device, crops.shape[:3]
    implementation = native.choose(implementation, device)
    max_sigma = float(params["sigma"].max(initial=0))
    on_gpu = implementation == "emulated" or (implementation == "compiled" and device.type == "cuda")
    radius = min(blur_window(recipe) // 2, math.ceil(4 * max_sigma))
    is_float = crops.dtype != torch.uint8
    if on_gpu and (is_float or radius > native.constant("MAX_BLUR_RADIUS")):
        implementation = "pytorch"  # the kernel has no floats, and the blur must fit in its shared memory
    if implementation == "pytorch" or dtype not in _COMPILED:
        return photometric_in_pytorch(crops, params, recipe, dtype)
    crops = crops.contiguous()
    params_on_device = native.on_device(params.view(np.uint8), device)
    out = _empty(crops.shape, dtype, device)
    peak = (_UNIT if is_float else _LEVELS).peak
    arguments = {
        "crops": crops.data_ptr(),
        "view_params": params_on_device.data_ptr(),
        "images": images,
        "height": height,
        "width": width,
        "blur_taps": blur_window(recipe),
        "scale": [1 / (peak * std) for std in recipe.statistics[1]],
        "shift": [-mean / std for mean, std in zip(*recipe.statistics, strict=True)],
        "dtype": native.pixel_type(dtype, implementation),
        "out": out.data_ptr(),
    }
    if on_gpu:
        parts = torch.empty(images, native.constant("LUMA_PARTS"), device=device)
        native.launch("photometric", device, **arguments, parts=parts.data_ptr(), max_sigma=max_sigma)
    else:
        native.call("photometric", **arguments, is_float=is_float, threads=torch.get_num_threads())
    return out


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate channels-last views of crops of this shape (images, height, width, channels)."""
    if device.type == "cpu":
        # Allocated by NumPy with malloc. PyTorch uses posix_memalign, which in glibc before 2.38 rarely reuses freed
        # blocks: with batches of 37 MB, of which two are in use, the process held seven.
        out = torch.from_numpy(np.empty(shape, f"i{dtype.itemsize}")).view(dtype)
    else:
        out = torch.empty(*shape, dtype=dtype, device=device)
    return out.permute(0, 3, 1, 2)


def photometric_in_pytorch(crops: Tensor, params: ViewParams, recipe: Augmentation, dtype: torch.dtype) -> Tensor:
    """Compute `photometric` with PyTorch operations, on any device."""
    scale = _LEVELS if crops.dtype == torch.uint8 else _UNIT
    out = _empty(crops.shape, dtype, crops.device)
    mean, std = (torch.tensor(n, device=crops.device).view(-1, 1, 1) * scale.peak for n in recipe.statistics)
    chunk = _CHUNK if crops.device.type == "cpu" else len(crops)
    for first in range(0, len(crops), max(1, chunk)):
        part = slice(first, first + chunk)
        x = crops[part].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        x = _color(x, params[part], recipe, scale)
        out[part] = x.sub_(mean).div_(std)
    dropped = np.flatnonzero(params["dropped"])
    if len(dropped):
        channels = params["dropped"][dropped].astype(np.int64) - 1
        out[native.on_device(dropped, out.device), native.on_device(channels, out.device)] = 0
    return out


def _color(x: Tensor, params: ViewParams, recipe: Augmentation, scale: _Scale) -> Tensor:
    """Apply all but normalize and channel drop to x (B, C, H, W), float32 of this scale, contiguous; may modify x."""
    for step in range(4):
        for change, apply in enumerate((_brightness, _contrast, _saturation, _hue)):
            factor = params["factors"][:, change]
            selected = params["jitter"] & (params["order"][:, step] == change)
            if change in _NEUTRAL:  # for RGB only: neutral in recipes for other images
                selected = selected & (factor != _NEUTRAL[change])
            _apply_to(x, selected, partial(apply, scale=scale), factor)
    sigma, window = params["sigma"], blur_window(recipe)
    if recipe.gain > 0:
        gain = torch.from_numpy(params["gain"][:, : x.shape[1], None, None].copy()).to(x.device)
        x = scale.clamp(x.mul_(gain))
    _apply_to(x, params["grayscale"], lambda part, _: scale.truncate(_luma(part)).expand_as(part), sigma)
    _apply_to(x, sigma > 0, lambda part, sigma: _blur(part, sigma, window, scale), sigma)
    middle = scale.peak / 2 + scale.is_integer / 2  # 128 or 0.5
    _apply_to(x, params["solarize"], lambda part, _: torch.where(part >= middle, scale.peak - part, part), sigma)
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


def _brightness(x: Tensor, factor: Tensor, scale: _Scale) -> Tensor:
    return scale.clamp(x * factor)


def _contrast(x: Tensor, factor: Tensor, scale: _Scale) -> Tensor:
    gray = scale.truncate(_luma(x)) if x.shape[1] == 3 else x
    mean = gray.mean((1, 2, 3), keepdim=True)
    return scale.clamp(torch.addcmul(mean * (1 - factor), x, factor))


def _saturation(x: Tensor, factor: Tensor, scale: _Scale) -> Tensor:
    return scale.clamp(torch.addcmul(scale.truncate(_luma(x)) * (1 - factor), x, factor))


def _hue(x: Tensor, hue_shift: Tensor, scale: _Scale) -> Tensor:
    """Shift the hue in HSV by `hue_shift` (B, 1, 1, 1), as a fraction of the color circle."""
    x = x / scale.peak
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
    if not scale.is_integer:
        return rgb
    return rgb.mul_(255 + 1 - 1e-3).floor_()  # torchvision's conversion from float to uint8


def blur_window(recipe: Augmentation) -> int:
    """Return the size of the blur kernel in pixels: odd, and at least 3, as 1 would not blur."""
    return max(3, int(recipe.image_size * recipe.blur_kernel) // 2 * 2 + 1)


def _blur(x: Tensor, sigma: Tensor, taps: int, scale: _Scale) -> Tensor:
    """Apply a separable Gaussian blur, with reflection at the borders. sigma: (B, 1, 1, 1) in pixels."""
    b, c, h, w = x.shape
    taps = min(taps, 2 * min(h, w) - 1)  # reflection padding must be smaller than the image
    offset = torch.arange(taps, device=x.device) - (taps - 1) / 2
    kernel = torch.exp(-0.5 * (offset / sigma.view(b, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # (B C, taps)
    planes = F.pad(x, (taps // 2,) * 4, mode="reflect").view(1, b * c, h + taps - 1, w + taps - 1)
    planes = F.conv2d(planes, kernel.view(b * c, 1, taps, 1), groups=b * c)
    planes = F.conv2d(planes, kernel.view(b * c, 1, 1, taps), groups=b * c)
    planes = planes.view(b, c, h, w)
    return planes.round_() if scale.is_integer else planes
