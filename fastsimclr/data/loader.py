"""The loader: sampler, crop backend and photometric augmentation, with a position to resume from."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.data import native
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.orientation import orient
from fastsimclr.data.params import ViewParams
from fastsimclr.data.photometric import photometric
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.sources import Source
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.profiling import stage


class Batch(NamedTuple):
    """This rank's part of a batch, B images, on the loader's device."""

    views: tuple[Tensor, ...]
    """One tensor (B, C, H, W) per view, normalized, channels-last, of the loader's dtype."""
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    """(B,) int64: indices of the images in the source."""
    label: Tensor
    """(B,) int64: class labels; -1 for unlabeled images."""
    position: dict[str, Any]
    """The loader's state after this batch, for `load_state_dict`: "epoch", "position" (images consumed in this epoch
    over all ranks), and "images" and "seed", which must match when it is loaded."""

    @property
    def ends_epoch(self) -> bool:
        """Whether this is the last batch of its epoch."""
        return self.position["position"] == 0

    @property
    def epoch(self) -> int:
        """The epoch of this batch, from 0."""
        return self.position["epoch"] - self.ends_epoch


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Options of a loader."""

    batch_size: int
    """Global batch size: images per batch over all ranks; each rank gets its share. The last batch may be smaller."""
    backend: str = "auto"
    """Backend that decodes and crops: "dali" (on a GPU or with its CPU operators), "torchvision" (a DataLoader) or
    "memory" (images of one size, decoded once and kept on the device). "auto": memory for built-in datasets and for
    small images that a scan found to be of one size; otherwise dali on a GPU and torchvision on a CPU."""
    world: World = SINGLE_PROCESS
    """This rank, the number of ranks that share each batch, and the device of the views."""
    seed: int = 0
    """Seed of the order and of the random parameters. Every backend yields the same views, up to its resampling (one
    level of 255)."""
    shuffle: bool = True
    """Shuffle the images every epoch; otherwise use the order of the source."""
    drop_last: bool = False
    """Drop the last batch of an epoch if it is smaller than the others."""
    min_local_batch: int = 1
    """Minimum number of images per rank in the last batch; it is dropped if some rank would have fewer."""
    workers: int | None = None
    """DataLoader worker processes or DALI threads; None picks by the number of CPU cores."""
    dtype: torch.dtype = torch.float32
    """Dtype of the views."""


class BatchRequest(NamedTuple):
    """A batch to load. With the sizes of its images, these determine its random parameters."""

    seed: int
    epoch: int
    index: NDArray[np.int64]  # type: ignore[assignment]  # (B,): indices of the images in the source


class CroppedBatch(NamedTuple):
    """A batch after crop, resize and horizontal flip, on the loader's device."""

    crops: tuple[Tensor, ...]
    """One tensor (B, S, S, C) per view, S its image_size: uint8 for 8-bit RGB, otherwise float32 in [0, 1]."""
    params: list[ViewParams]
    """One array (B,) per view: the sampled parameters, of which the photometric ones are still to be applied."""


class CropBackend(Protocol):
    """The part of a loader that depends on the backend: read, decode, sample parameters, crop, resize and flip."""

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        """Yield the batch of each request, in order."""
        ...

    def device_bytes(self) -> int:
        """Return the bytes held on the loader's device, as far as known."""
        ...

    def close(self) -> None:
        """Stop the workers and free memory."""
        ...


class ViewLoader:
    """Iterable of augmented batches, one epoch per iteration; created by `open_views`.

    A batch depends only on the source, the augmentation, the seed, the epoch and its position in the order, so a loader
    that loads the state of another one continues exactly as that one would.
    """

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        sampler: Sampler,
        crop_backend: CropBackend,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
    ) -> None:
        self.source, self.augmentation, self.device, self.dtype, self.backend = (
            source,
            augmentation,
            device,
            dtype,
            backend,
        )
        self._sampler, self._crop_backend = sampler, crop_backend
        self._crops: Generator[CroppedBatch, None, None] | None = None  # of the latest iteration

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._sampler)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yield the batches of the epoch from the current position (the start, unless a state was loaded).

        The crop backend serves one iteration at a time: a new iteration ends the previous one, which raises
        RuntimeError if continued.
        """
        sampler = self._sampler
        first = sampler.position
        parts = sampler.remaining()
        epoch = sampler.epoch
        if not parts:  # resumed after the last batch that is not dropped
            sampler.epoch, sampler.position = epoch + 1, 0
        requests = (BatchRequest(sampler.seed, epoch, index) for index in parts if len(index))
        if self._crops is not None:
            self._crops.close()  # drops the batches prefetched for the previous iteration
        self._crops = crops = self._crop_backend.crops(requests)
        try:
            for step, index in enumerate(parts, start=1):
                if self._crops is not crops:
                    raise RuntimeError("this iteration ended when a newer one of the same loader started")
                cropped = next(crops) if len(index) else None
                # The position after this batch: its end, or the start of the next epoch.
                is_last = step == len(parts)
                sampler.epoch = epoch + is_last
                sampler.position = 0 if is_last else first + step * sampler.batch_size
                if cropped is not None:
                    yield self._finish(index, cropped)
        finally:
            crops.close()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. If it is the current epoch, the position within it is kept."""
        if epoch != self._sampler.epoch:
            self._sampler.epoch, self._sampler.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch yielded."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position of another loader, whose batch size and number of ranks may differ."""
        self._sampler.load_state_dict(state)

    def device_bytes(self) -> int:
        """Return the bytes that the loader holds on its device between batches, as far as known."""
        return self._crop_backend.device_bytes()

    def close(self) -> None:
        """Stop the workers and free memory."""
        self._crop_backend.close()

    def _finish(self, index: NDArray[np.int64], cropped: CroppedBatch) -> Batch:
        with stage("views"):
            views = tuple(
                photometric(orient(crops, params, recipe), params, recipe, self.dtype)
                for crops, params, recipe in zip(cropped.crops, cropped.params, self.augmentation.recipes, strict=True)
            )
        return Batch(
            views=views,
            index=native.on_device(index, self.device),
            label=native.on_device(self.source.labels[index], self.device),
            position=self.state_dict(),
        )
