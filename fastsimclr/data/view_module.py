"""The views of batches that are already tensors, as a module: `Augmentation.as_module`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.crop import crop
from fastsimclr.data.orientation import orient
from fastsimclr.data.params import sample_batch_params
from fastsimclr.data.photometric import photometric
from fastsimclr.data.pixels import count_channels, default_format
from fastsimclr.errors import UserError

_RANK_STRIDE = 1 << 40  # images per rank: by default, rank r numbers its images from r * 2^40


class ViewModule(nn.Module):
    """Augmented views of batches of images, on the device of the images; created by `Augmentation.as_module`.

    The views of an image depend on the seed, the epoch and the image's index only, as with `open_views`. Without an
    explicit index, the module numbers the images in the order they arrive, and each rank has its own numbers, so no two
    images get the same random parameters. The number of images seen so far is part of `state_dict()`: a resumed run
    continues with the parameters that an uninterrupted one would have sampled. In the workers of a DataLoader, which
    all have their own copy of this number, pass an index.

    The module has no parameters and no gradient, and ignores autocast. `torch.compile` runs it outside of the graph.
    """

    def __init__(
        self, augmentation: Augmentation, *, seed: int = 0, rank: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """The arguments of `Augmentation.as_module`."""
        super().__init__()
        augmentation.check_channels(augmentation.channels)
        if not dtype.is_floating_point:
            raise UserError(f"dtype: got {dtype}, expected a float dtype such as torch.float32 or torch.bfloat16")
        self.augmentation, self.seed, self.rank, self.dtype = augmentation, seed, rank, dtype
        self._images_seen = 0  # on this rank, without an explicit index

    @torch.compiler.disable
    def forward(
        self, images: Tensor, *, index: Tensor | NDArray[np.int64] | Sequence[int] | None = None, epoch: int = 0
    ) -> tuple[Tensor, ...]:
        """Return the views of a batch: `num_views` tensors (B, C, S, S), normalized and channels-last, S = image_size.

        images: (B, C, H, W), uint8, uint16, or float in [0, 1]; C is the length of the recipe's mean. RGB of uint8 is
            the fastest: other images are augmented in float32.
        index, epoch: numbers of the images (B,), on the CPU, and the epoch, to get the views of `open_views` with the
            same seed. By default the images are numbered in the order they arrive, and the epoch is 0.

        Raises UserError if the images or the index have another shape, dtype or range. The range of floats is checked
        on the CPU only, as on a GPU the check would have to wait for them.
        """
        self._check(images)
        batch = len(images)
        if index is None:
            first = self._rank() * _RANK_STRIDE + self._images_seen
            numbers = np.arange(first, first + batch)
            self._images_seen += batch
        else:
            numbers = np.asarray(index, dtype=np.int64)
            if numbers.shape != (batch,):
                raise UserError(f"index: got shape {numbers.shape}, expected ({batch},), one number per image")
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            source = images.float() if images.dtype.is_floating_point else images
            source = source.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)
            pixels = default_format(images.shape[1], source.dtype)
            sizes = np.tile(source.shape[1:3], (batch, 1))
            views = []
            for params, recipe in zip(
                sample_batch_params(self.augmentation, self.seed, epoch, numbers, sizes),
                self.augmentation.recipes,
                strict=True,
            ):
                crops = orient(crop(source, np.arange(batch), params, recipe, pixels=pixels), params, recipe)
                views.append(photometric(crops, params, recipe, self.dtype))
            return tuple(views)

    def _check(self, images: Tensor) -> None:
        channels = self.augmentation.channels
        if images.ndim != 4 or 0 in images.shape:
            raise UserError(f"images: got shape {tuple(images.shape)}, expected (B, C, H, W) with at least one pixel")
        if images.shape[1] != channels:
            raise UserError(
                f"images: got shape {tuple(images.shape)}, expected (B, C, H, W) with {count_channels(channels)}, the "
                "length of mean"
            )
        if images.dtype not in (torch.uint8, torch.uint16) and not images.dtype.is_floating_point:
            raise UserError(f"images: got {images.dtype}, expected uint8, uint16, or float in [0, 1]")
        if images.dtype.is_floating_point and images.device.type == "cpu":
            low, high = images.aminmax()
            if not (low >= 0 and high <= 1):  # also for NaN
                raise UserError(
                    f"images: got floats from {low:.3g} to {high:.3g}, expected [0, 1]: divide levels by 255, and "
                    "leave normalization to this module"
                )

    def _rank(self) -> int:
        if self.rank is not None:
            return self.rank
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def get_extra_state(self) -> Tensor:
        """Return the number of images seen on this rank, for `state_dict`. It is no buffer, which DDP would copy from
        rank 0 to all ranks."""
        return torch.tensor(self._images_seen)

    def set_extra_state(self, state: Any) -> None:
        """Continue after the number of images of `get_extra_state`."""
        self._images_seen = int(state)

    def extra_repr(self) -> str:
        size, views = self.augmentation.image_size, self.augmentation.num_views
        return f"image_size={size}, num_views={views}, seed={self.seed}, dtype={self.dtype}"
