"""What every loader shares: the order, the draws, the photometric op, and the place where a run stands."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsimclr.data import native
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.params import ViewParams
from fastsimclr.data.photometric import photometric
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.sources import Source
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.profiling import stage


class Batch(NamedTuple):
    """A rank's part of a batch, on the loader's device."""

    views: tuple[Tensor, ...]
    """(B, 3, H, W) of each view, normalised, channels-last."""
    index: Tensor  # type: ignore[assignment]  # a field here, not tuple's method
    """(B,) int64: which images of the source."""
    label: Tensor
    """(B,) int64; -1 where there is none."""
    position: dict[str, Any]
    """The loader's state after this batch, for `load_state_dict`: "epoch", "position" (images of it, over all ranks),
    and the "images" and "seed" that it belongs to."""

    @property
    def ends_epoch(self) -> bool:
        """Whether the next batch starts another epoch."""
        return self.position["position"] == 0

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0, that this batch is part of."""
        return self.position["epoch"] - self.ends_epoch


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a loader delivers a source's images."""

    batch_size: int
    """Images per batch, over all ranks; each rank gets its part. The last batch may be smaller."""
    backend: str = "auto"
    """dali (on a GPU, or its CPU operators), torchvision (a DataLoader), memory (images of one size, decoded once and
    kept on the device); auto: memory for the built-in sets and for small images that a scan has found to be of one
    size, else dali on a GPU and torchvision without one."""
    world: World = SINGLE_PROCESS
    """The device on which views are made and delivered, and this rank among those that share each batch."""
    seed: int = 0
    """Of the order and of every draw. Views are the same for every backend, up to how it resamples (one level)."""
    shuffle: bool = True
    """A new order each epoch; otherwise the source's."""
    drop_last: bool = False
    """Leave out an epoch's last batch if it is smaller than the others."""
    min_local_batch: int = 1
    """The last batch is also left out where some rank would have fewer than this many images of it."""
    workers: int | None = None
    """DataLoader processes, or DALI threads; None: by the number of cores."""
    dtype: torch.dtype = torch.float32
    """Of the views."""


class BatchRequest(NamedTuple):
    """A batch to make: by these three and the images' sizes, `draw_views` draws it."""

    seed: int
    epoch: int
    index: NDArray[np.int64]  # type: ignore[assignment]  # (B,): which images of the source


class CroppedBatch(NamedTuple):
    """A batch half made, on the loader's device."""

    crops: tuple[Tensor, ...]
    """(B, S, S, 3) uint8 of each view."""
    params: list[ViewParams]
    """(B,) of each view: what is still to happen to its colours."""


class CropBackend(Protocol):
    """The first half of a loader, which differs: it reads, decodes, draws, crops, resizes and flips."""

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        """Each job's batch, in order."""
        ...

    def device_bytes(self) -> int:
        """Memory that it holds on the loader's device, as far as it knows."""
        ...

    def close(self) -> None:
        """Stop workers and give back memory."""
        ...


class ViewLoader:
    """An epoch's batches each time it is iterated over; `open_views` makes one.

    A batch depends on the source, the recipe, the seed, the epoch and its place in the order alone, so that a loader
    with the state of another continues exactly as that one would have.
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
        """Batches of a whole epoch."""
        return len(self._sampler)

    def __iter__(self) -> Generator[Batch, None, None]:
        """The batches from the position on (an epoch's start, but for a loaded state).

        A front serves one iteration at a time: a new one ends the one before, which raises RuntimeError if continued.
        """
        sampler = self._sampler
        first = sampler.position
        parts = sampler.remaining()
        epoch = sampler.epoch
        if not parts:  # resumed behind the last batch that these options leave
            sampler.epoch, sampler.position = epoch + 1, 0
        requests = (BatchRequest(sampler.seed, epoch, index) for index in parts if len(index))
        if self._crops is not None:
            self._crops.close()  # else the front would hand out what it has made ahead for the one before
        self._crops = crops = self._crop_backend.crops(requests)
        try:
            for step, index in enumerate(parts, start=1):
                if self._crops is not crops:
                    raise RuntimeError("this iteration ended when a newer one of the same loader began")
                made = next(crops) if len(index) else None
                # Where to go on once this batch is used: at its end, or at the next epoch's start.
                done = step == len(parts)
                sampler.epoch = epoch + done
                sampler.position = 0 if done else first + step * sampler.batch_size
                if made is not None:
                    yield self._finish(index, made)
        finally:
            crops.close()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. A position loaded or reached within that very epoch is kept."""
        if epoch != self._sampler.epoch:
            self._sampler.epoch, self._sampler.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position of another loader; its batch size and number of ranks may differ."""
        self._sampler.load_state_dict(state)

    def device_bytes(self) -> int:
        """Memory that the loader holds on its device between batches, as far as it is known."""
        return self._crop_backend.device_bytes()

    def close(self) -> None:
        """Stop workers and give back memory."""
        self._crop_backend.close()

    def _finish(self, index: NDArray[np.int64], made: CroppedBatch) -> Batch:
        with stage("views"):
            views = tuple(
                photometric(crops, params, recipe, self.dtype)
                for crops, params, recipe in zip(made.crops, made.params, self.augmentation.recipes, strict=True)
            )
        return Batch(
            views=views,
            index=native.on_device(index, self.device),
            label=native.on_device(self.source.labels[index], self.device),
            position=self.state_dict(),
        )
