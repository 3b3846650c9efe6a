"""Images of one size, decoded and kept on the device: a whole batch is cropped by two matrix products."""

from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch import Tensor

from fastsimclr.data.draws import boxes
from fastsimclr.data.loader import Job
from fastsimclr.data.sources import ArraySource
from fastsimclr.views import Views


class MemoryFront:
    """Crop, resize and flip as a product Y X W^T with the weights of each image's rows (Y) and columns (W).

    The weights are those of torchvision's antialiased resize (triangle or Keys' cubic with a = -0.5, widened when
    shrinking, renormalised at the crop's border).
    """

    def __init__(self, source: ArraySource, views: Views, device: torch.device) -> None:
        self.views, self.device = views, device
        self.images = source.images.to(device)  # (N, 3, h, w) uint8

    def crops(self, jobs: Iterator[Job]) -> Generator[tuple[Tensor, ...], None, None]:
        height, width = self.images.shape[2:]
        for job in jobs:
            images = self.images[torch.from_numpy(job.index).to(self.device)].float()  # (B, 3, h, w)
            full = np.full(len(job.index), 1)
            views = []
            for draws in job.draws:
                box = torch.from_numpy(boxes(self.views, draws, full * height, full * width)).to(self.device)
                rows = self._weights(box[:, 0], box[:, 2], height)[:, None]  # (B, 1, H, h)
                columns = self._weights(box[:, 1], box[:, 3], width)
                flip = torch.from_numpy(draws.flip).to(self.device)
                columns = torch.where(flip[:, None, None], columns.flip(1), columns)[:, None]  # (B, 1, W, w)
                # torchvision rounds after the columns, and again after the rows; halves up
                wide = (images @ columns.mT).add_(0.5).floor_().clamp_(0, 255)
                view = (rows @ wide).add_(0.5).floor_().clamp_(0, 255)
                views.append(view.to(torch.uint8).permute(0, 2, 3, 1))
            yield tuple(views)

    def close(self) -> None:
        pass

    def _weights(self, start: Tensor, length: Tensor, whole: int) -> Tensor:
        """(B, image_size, whole): how much pixel j of a side counts in pixel i of the crop [start, start + length)."""
        out = self.views.image_size
        scale = (length.float() / out)[:, None, None]
        widened = scale.clamp_min(1.0)
        center = start[:, None, None] + (torch.arange(out, device=self.device).float()[:, None] + 0.5) * scale
        pixel = torch.arange(whole, device=self.device).float()
        distance = ((pixel + 0.5 - center) / widened).abs()
        if self.views.interpolation == "bilinear":
            weight = (1 - distance).clamp_min(0)
        else:
            near = (1.5 * distance - 2.5) * distance**2 + 1
            far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
            weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
        first, end = start[:, None, None], (start + length)[:, None, None]
        weight = torch.where((pixel >= first) & (pixel < end), weight, 0.0)
        return weight / weight.sum(2, keepdim=True)
