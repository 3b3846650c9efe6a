"""The loader: sampler, crop backend and photometric augmentation, with a position to resume from."""

import contextlib
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
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
from fastsimclr.data.sampler import SampledBatch, Sampler
from fastsimclr.data.sources import Source, reason_of
from fastsimclr.distributed import SINGLE_PROCESS, World
from fastsimclr.errors import UserError
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
    replaced: NDArray[np.bool_]
    """(B,): whether the image stands in for one that cannot be used (`ViewLoader.bad`)."""

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
    small images of one size; otherwise dali on a GPU and torchvision on a CPU."""
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
    read_ahead: bool = True
    """Start to read the next epoch before the current one ends. Turn it off to read a single epoch."""
    max_bad: float = 0.01
    """Largest fraction of bad images among those that this rank has met, after 1,000 or an epoch: UserError above it.
    Also the largest fraction of all images that may be known to be bad beforehand."""


class BatchRequest(NamedTuple):
    """A batch to load. With the sizes of its images, these determine its random parameters."""

    seed: int
    epoch: int
    index: NDArray[np.int64]  # type: ignore[assignment]  # (B,): indices of the images in the source
    bad: frozenset[int] = frozenset()
    """Images known to be bad, which are replaced without being read."""


class CroppedBatch(NamedTuple):
    """A batch after crop, resize and horizontal flip, on the loader's device."""

    crops: tuple[Tensor, ...]
    """One tensor (B, S, S, C) per view, S its image_size: uint8 for 8-bit RGB, otherwise float32 in [0, 1]."""
    params: list[ViewParams]
    """One array (B,) per view: the sampled parameters, of which the photometric ones are still to be applied."""
    used: NDArray[np.int64]
    """(B,): indices of the images used, which replace bad ones (data/replacement.py)."""
    bad: dict[int, str]
    """Images that were found bad, by index, with the messages."""


class CropBackend(Protocol):
    """The part of a loader that depends on the backend: read, decode, sample parameters, crop, resize and flip.

    The parameters of a bad image's replacement are those of the bad image, for the size of the replacement.
    """

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        """Yield the batch of each request, in order."""
        ...

    def device_bytes(self) -> int:
        """Return the bytes held on the loader's device, as far as known."""
        ...

    def close(self) -> None:
        """Stop the workers and free memory."""
        ...


_MIN_MET = 1000  # images, before the fraction of bad ones is limited
_MAX_NAMED = 3  # bad images named in an error
_Stream = Generator[tuple[SampledBatch, CroppedBatch | None], None, None]


def _stream(crop_backend: CropBackend, sampler: Sampler, bad: dict[int, str], read_ahead: bool) -> _Stream:
    """Yield the batches from the sampler's position on, with None for those of which this rank has no image.

    bad: images known to be bad; may grow. read_ahead: go on with the next epochs, without end.
    """
    sampled: deque[SampledBatch] = deque()  # requested, but not yielded

    def requests() -> Iterator[BatchRequest]:
        known_bad = frozenset(bad)
        for batch in sampler.from_here_on() if read_ahead else sampler.remaining():
            sampled.append(batch)
            if len(known_bad) != len(bad):
                known_bad = frozenset(bad)
            if len(batch.index):
                yield BatchRequest(sampler.seed, batch.epoch, batch.index, known_bad)

    with contextlib.closing(crop_backend.crops(requests())) as crops:
        for cropped in crops:
            while len((batch := sampled.popleft()).index) == 0:
                yield batch, None
            yield batch, cropped
        while sampled:
            yield sampled.popleft(), None


class ViewLoader:
    """Iterable of augmented batches, one epoch per iteration; created by `open_views`.

    A batch depends only on the source, the augmentation, the seed, the epoch and its position in the order, so a loader
    that loads the state of another one continues exactly as that one would.

    bad: the images known to be bad, by index, and why: those of the source, those met so far, and those that the caller
    adds. They are replaced by other images of the source.
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
        *,
        read_ahead: bool = True,
        max_bad: float = 1.0,
    ) -> None:
        self.source, self.augmentation, self.device, self.dtype, self.backend = (
            source,
            augmentation,
            device,
            dtype,
            backend,
        )
        self.bad = dict(source.bad)
        self._max_bad = max_bad
        self._met = self._met_bad = 0  # images
        self._limit_bad(len(self.bad), len(source))
        self._sampler, self._crop_backend, self._read_ahead = sampler, crop_backend, read_ahead
        self._stream: _Stream | None = None  # its next batch is that of `_stream_position`
        self._stream_position = (0, 0)
        self._iteration = object()  # the latest

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._sampler)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yield the batches of the epoch from the current position (the start, unless a state was loaded).

        The crop backend serves one iteration at a time: a new iteration ends the previous one, which raises
        RuntimeError if continued. The batches read ahead at the end of an epoch are those that the next iteration
        starts with.
        """
        sampler = self._sampler
        if sampler.is_at_end:  # resumed after the last batch that is not dropped
            sampler.epoch, sampler.position = sampler.epoch + 1, 0
            return
        self._iteration = iteration = object()
        if self._stream is None or self._stream_position != (sampler.epoch, sampler.position):
            self._end_stream()  # drops the batches that it has read ahead
            self._stream = _stream(self._crop_backend, replace(sampler), self.bad, self._read_ahead)
        stream, ends_epoch = self._stream, False
        try:
            while not ends_epoch:
                if self._iteration is not iteration:
                    raise RuntimeError("this iteration ended when a newer one of the same loader started")
                batch, cropped = next(stream)
                sampler.epoch, sampler.position = self._stream_position = batch.next_epoch, batch.next_position
                ends_epoch = batch.next_position == 0
                if cropped is not None:
                    yield self._finish(batch, cropped)
        finally:
            if self._iteration is iteration and not (ends_epoch and self._read_ahead):
                self._end_stream()

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
        self._end_stream()
        self._crop_backend.close()

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _limit_bad(self, bad: int, images: int) -> None:
        """Raise UserError if more than `max_bad` of `images` are bad."""
        if bad > self._max_bad * images:
            named = [f"{self.source.name(index)}: {self.bad[index]}" for index in list(self.bad)[-bad:][:_MAX_NAMED]]
            raise UserError(
                f"max_bad: got {bad} of {images} images that cannot be used, expected a fraction of at most "
                f"{self._max_bad:g}: {'; '.join(named)}{'; …' if bad > len(named) else ''}; repair or restore them, or "
                "raise the limit"
            )

    def _finish(self, batch: SampledBatch, cropped: CroppedBatch) -> Batch:
        for index, message in cropped.bad.items():
            self.bad.setdefault(index, reason_of(message, self.source, index))
        self._met_bad += len(cropped.bad)
        self._met += len(batch.index) + len(cropped.bad.keys() - set(batch.index.tolist()))
        if self._met >= _MIN_MET or batch.next_position == 0:
            self._limit_bad(self._met_bad, self._met)
        with stage("views"):
            views = tuple(
                photometric(orient(crops, params, recipe), params, recipe, self.dtype)
                for crops, params, recipe in zip(cropped.crops, cropped.params, self.augmentation.recipes, strict=True)
            )
        return Batch(
            views=views,
            index=native.on_device(cropped.used, self.device),
            label=native.on_device(self.source.labels[cropped.used], self.device),
            position=self.state_dict(),
            replaced=cropped.used != batch.index,
        )
