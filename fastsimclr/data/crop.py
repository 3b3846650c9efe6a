"""Crop, antialiased resize and flip of a batch of decoded images of one size.

The filters are torchvision's (a triangle, or Keys' cubic with a = -0.5; widened when shrinking, renormalized at the
border of the crop). 8-bit RGB is rounded to integer levels after the columns and again after the rows; other images
become floats from 0 to 1. The compiled extension implements it on CPUs, and for 8-bit RGB on GPUs (csrc/crop.*). The
PyTorch implementation replaces it elsewhere, and tests compare against it.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.data import native
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.params import ViewParams
from fastsimclr.data.pixels import RGB8, PixelFormat

_MAX_HEIGHT = 1000  # pixels: largest images whose crops fit in the kernel's shared memory


def crop(
    images: Tensor,
    index: NDArray[np.int64],
    params: ViewParams,
    recipe: Augmentation,
    implementation: native.Implementation = "auto",
    *,
    pixels: PixelFormat = RGB8,
) -> Tensor:
    """Crop images[index[i]] to the box params[i], resize and flip; return (B, S, S, C), S = recipe.image_size.

    images: (N, H, W, C) of the format `pixels`; the result is on its device, uint8 for 8-bit RGB, otherwise float32 in
        [0, 1]. index, params: (B,).
    """
    device = images.device
    implementation = native.choose(implementation, device)
    on_gpu = implementation == "emulated" or device.type == "cuda"
    if implementation == "pytorch" or (on_gpu and (pixels != RGB8 or images.shape[1] > _MAX_HEIGHT)):
        return crop_in_pytorch(images, index, params, recipe, pixels)
    images = images.contiguous()
    size, dtype = recipe.image_size, torch.uint8 if pixels == RGB8 else torch.float32
    out = torch.empty((len(index), size, size, pixels.channels), dtype=dtype, device=device)
    params_on_device = native.on_device(params.view(np.uint8), device)
    index_on_device = native.on_device(index, device)
    arguments: dict[str, Any] = {
        "images": images.data_ptr(),
        "height": images.shape[1],
        "width": images.shape[2],
        "index": index_on_device.data_ptr(),
        "view_params": params_on_device.data_ptr(),
        "num_views": len(index),
        "size": size,
        "bicubic": recipe.interpolation == "bicubic",
        "out": out.data_ptr(),
    }
    if on_gpu:
        native.launch("crop", device, **arguments)
    elif pixels == RGB8:
        native.call("crop", **arguments, threads=torch.get_num_threads())
    else:
        arguments |= {"type": native.value_type(pixels.dtype), "channels": pixels.channels}
        arguments |= {"value_range": pixels.value_range, "threads": torch.get_num_threads()}
        native.call("crop_to_floats", **arguments)
    return out


def crop_in_pytorch(
    images: Tensor, index: NDArray[np.int64], params: ViewParams, recipe: Augmentation, pixels: PixelFormat = RGB8
) -> Tensor:
    """Compute `crop` as a product Y X W^T with resampling weights of the rows (Y) and the columns (W)."""
    device = images.device
    batch = images[torch.from_numpy(index).to(device)].permute(0, 3, 1, 2).float()  # (B, C, h, w)
    height, width = batch.shape[2:]
    box = torch.from_numpy(params["box"].astype(np.int64)).to(device)
    rows = _weights(recipe, box[:, 0], box[:, 2], height)[:, None]  # (B, 1, S, h)
    columns = _weights(recipe, box[:, 1], box[:, 3], width)
    flip = torch.from_numpy(params["flip"].copy()).to(device)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)[:, None]  # (B, 1, S, w)
    if pixels != RGB8:
        return pixels.to_unit_(rows @ (batch @ columns.mT)).permute(0, 2, 3, 1).contiguous()
    wide = (batch @ columns.mT).add_(0.5).floor_().clamp_(0, 255)
    view = (rows @ wide).add_(0.5).floor_().clamp_(0, 255)
    return view.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _weights(recipe: Augmentation, start: Tensor, length: Tensor, size: int) -> Tensor:
    """Return weights (B, image_size, size) of the image's pixels j in the pixels i of the crop [start, start + length).

    start, length: (B,) in pixels. size: height or width of the images.
    """
    scale = (length.float() / recipe.image_size)[:, None, None]
    center = start[:, None, None] + (torch.arange(recipe.image_size, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(size, device=start.device).float()
    distance = ((pixel + 0.5 - center) / scale.clamp_min(1.0)).abs()
    if recipe.interpolation == "bilinear":
        weight = (1 - distance).clamp_min(0)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    first, end = start[:, None, None], (start + length)[:, None, None]
    weight = torch.where((pixel >= first) & (pixel < end), weight, 0.0)
    return weight / weight.sum(2, keepdim=True)
