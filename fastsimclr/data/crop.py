"""Views cut out of decoded images of one size: crop, antialiased resize and flip of a whole batch.

The filters are torchvision's on uint8 tensors (a triangle, or Keys' cubic with a = -0.5, widened when shrinking,
renormalised at the crop's border), rounded to levels after the columns and again after the rows. The compiled extension
does it (csrc/crop.*); without it, and as its oracle, PyTorch.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.data import native
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.params import ViewParams

_MAX_HEIGHT = 1000  # of images whose crops the kernel holds in shared memory


def crop(
    images: Tensor,
    index: NDArray[np.int64],
    params: ViewParams,
    recipe: Augmentation,
    implementation: native.Implementation = "auto",
) -> Tensor:
    """Crops (B, S, S, 3) uint8 of images[index[i]] by draws[i], S being recipe.image_size.

    images: (N, H, W, 3) uint8; the crops are on its device.
    """
    device = images.device
    chosen = native.choose(implementation, device)
    if chosen == "pytorch" or (device.type == "cuda" and images.shape[1] > _MAX_HEIGHT):
        return crop_in_pytorch(images, index, params, recipe)
    out = torch.empty((len(index), recipe.image_size, recipe.image_size, 3), dtype=torch.uint8, device=device)
    params_on_device = native.on_device(params.view(np.uint8), device)
    index_on_device = native.on_device(index, device)
    arguments = {
        "images": images.contiguous().data_ptr(),
        "height": images.shape[1],
        "width": images.shape[2],
        "index": index_on_device.data_ptr(),
        "view_params": params_on_device.data_ptr(),
        "num_views": len(index),
        "size": recipe.image_size,
        "bicubic": recipe.interpolation == "bicubic",
        "out": out.data_ptr(),
    }
    if chosen == "emulated" or device.type == "cuda":
        native.launch("crop", device, **arguments)
    else:
        native.call("crop", **arguments, threads=torch.get_num_threads())
    return out


def crop_in_pytorch(images: Tensor, index: NDArray[np.int64], params: ViewParams, recipe: Augmentation) -> Tensor:
    """`crop` as a product Y X W^T with the weights of each image's rows (Y) and columns (W)."""
    device = images.device
    chosen = images[torch.from_numpy(index).to(device)].permute(0, 3, 1, 2).float()  # (B, 3, h, w)
    height, width = chosen.shape[2:]
    box = torch.from_numpy(params["box"].astype(np.int64)).to(device)
    rows = _weights(recipe, box[:, 0], box[:, 2], height)[:, None]  # (B, 1, S, h)
    columns = _weights(recipe, box[:, 1], box[:, 3], width)
    flip = torch.from_numpy(params["flip"].copy()).to(device)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)[:, None]  # (B, 1, S, w)
    wide = (chosen @ columns.mT).add_(0.5).floor_().clamp_(0, 255)
    view = (rows @ wide).add_(0.5).floor_().clamp_(0, 255)
    return view.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _weights(recipe: Augmentation, start: Tensor, length: Tensor, whole: int) -> Tensor:
    """(B, image_size, whole): how much pixel j of a side counts in pixel i of the crop [start, start + length)."""
    scale = (length.float() / recipe.image_size)[:, None, None]
    center = start[:, None, None] + (torch.arange(recipe.image_size, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(whole, device=start.device).float()
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
