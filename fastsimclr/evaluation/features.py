"""Compute the representations of all images of a source: gathered on all ranks, or each rank's part."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastsimclr import stopping
from fastsimclr.data import Source
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.dataset import open_loader
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.distributed import World, all_gather_rows, gather_objects, gather_sizes, raise_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.models import Backbone, Encoder, count_features
from fastsimclr.precision import autocast_to
from fastsimclr.progress_bar import progress_bar
from fastsimclr.stopping import Stopped

Sync = Callable[[UserError | None], None]
"""Called by all ranks at the same time, with this rank's error or None. Raises on all ranks to end the work on all."""


@dataclass(frozen=True)
class Shard:
    """This rank's part of the representations of a source's images, on its device."""

    images: Tensor
    """(n,) int64: indices of the images in the source."""
    features: Tensor
    """(n, D) float16, normalized."""

    @classmethod
    def of(cls, images: Tensor, features: Tensor) -> "Shard":
        """features: (n, D), any float dtype and length."""
        return cls(images, F.normalize(features.float(), dim=1).half())

    def __len__(self) -> int:
        return len(self.images)


def check_images(encoder: Encoder | Backbone, source: Source, augmentation: Augmentation) -> None:
    """Raise UserError unless the encoder accepts the images of the source at the size of the augmentation."""
    expected, channels = encoder.spec.channels, source.pixels.channels
    if channels != expected:
        raise UserError(f"--data: got images of {channels} channels, expected {expected}, as in the encoder's training")
    count_features(encoder, augmentation.image_size, channels)


def embed_batches(
    encoder: nn.Module,
    source: Source,
    augmentation: Augmentation,
    config: LoaderConfig,
    *,
    autocast: torch.dtype | None = None,
    title: str = "embedding",
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """Yield this rank's part of each batch, on the CPU: the images' indices in the source (B,), representations (B, D)
    float32, and labels (B,). Images that cannot be used are left out, and added to `source.bad`.

    Images are prepared by `augmentation.for_evaluation()`; the encoder runs in eval mode.

    config: the loader's configuration; order, dropped batches and dtype are overridden.
    autocast: dtype of autocast; None: run in the dtype of the encoder's parameters.
    title: title of the progress bar, which rank zero shows.
    """
    config = replace(
        config,
        batch_size=min(config.batch_size, len(source)),
        shuffle=False,
        drop_last=False,
        min_local_batch=0,
        read_ahead=False,
        dtype=autocast or torch.float32,  # autocast would convert the images anyway
    )
    loader = open_loader(source, augmentation.for_evaluation(), config)
    dtype = next(encoder.parameters()).dtype
    training = {module: module.training for module in encoder.modules()}  # frozen parts are in eval mode
    encoder.eval()
    bar = progress_bar(len(source), title, "image", visible=config.world.is_rank_zero)
    try:
        for batch in loader:
            with torch.inference_mode(), autocast_to(config.world.device, autocast):
                images = batch.views[0] if autocast else batch.views[0].to(dtype)
                features = encoder(images).float().cpu()
            kept = torch.from_numpy(np.flatnonzero(~batch.replaced))  # rows of replacements would count twice
            yield batch.index.cpu()[kept], features[kept], batch.label.cpu()[kept]
            bar.update(len(features) * config.world.world_size)
    finally:
        source.bad = loader.bad
        bar.close()
        loader.close()
        for module, mode in training.items():
            module.training = mode


def embed(
    encoder: nn.Module,
    source: Source,
    augmentation: Augmentation,
    config: LoaderConfig,
    *,
    autocast: torch.dtype | None = None,
    title: str = "embedding",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices (N,), representations (N, D) float32 and labels (N,) of all images of `source`, in its order.

    All are on the CPU, on every rank. Images that cannot be used are left out, and added to `source.bad`. The arguments
    are those of `embed_batches`.
    """
    width: int = encoder.out_features  # type: ignore[assignment]  # nn.Module: any attribute may be a tensor
    empty = torch.empty(0, dtype=torch.int64), torch.empty(0, width), torch.empty(0, dtype=torch.int64)
    rows = list(embed_batches(encoder, source, augmentation, config, autocast=autocast, title=title)) or [empty]
    images, features, labels = gather_by_image(config.world, *(torch.cat(column) for column in zip(*rows, strict=True)))
    gather_bad(source, config.world)
    return images, features, labels


def gather_bad(source: Source, world: World) -> None:
    """Add the images that other ranks have found bad to `source.bad`."""
    found = gather_objects(dict(source.bad), world)
    source.bad = dict(sorted((index, reason) for of_rank in found for index, reason in of_rank.items()))


def gather_by_image(world: World, images: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Gather rows of all ranks, sorted by their images.

    images: (n_r,) int64; rows: (n_r, ...) each. All are on the CPU. Returns all of them, (sum of n_r, ...), on all
    ranks.
    """
    columns = [images, *rows]
    if world.world_size > 1:
        group = dist.group.WORLD
        assert group is not None
        sizes = gather_sizes(len(images), group, torch.device("cpu"))
        columns = [all_gather_rows(column, sizes, group) for column in columns]
    order = columns[0].argsort()
    return tuple(column[order] for column in columns)


def embed_shard(
    encoder: nn.Module,
    source: Source,
    augmentation: Augmentation,
    config: LoaderConfig,
    *,
    autocast: torch.dtype | None = None,
    title: str = "embedding",
    sync: Sync | None = None,
) -> Shard:
    """Return this rank's part of the representations of all images of `source`.

    Raises on all ranks if one fails. sync: called between batches; default: only exchange errors. The other arguments
    are those of `embed_batches`.
    """
    device, sync = config.world.device, sync or exchange_errors(config.world)
    width: int = encoder.out_features  # type: ignore[assignment]  # nn.Module: any attribute may be a tensor
    empty = torch.empty(0, dtype=torch.int64, device=device)
    parts = [Shard(empty, torch.empty(0, width, dtype=torch.float16, device=device))]
    batch_size = min(config.batch_size, len(source))
    with closing(embed_batches(encoder, source, augmentation, config, autocast=autocast, title=title)) as batches:
        for _ in range(0, len(source), batch_size):  # a rank may have no image in the last batch
            batch, failure = None, None
            try:
                with stopping.active().interruptible():
                    batch = next(batches, None)
            except UserError as error:
                failure = error
            except Stopped:
                sync(None)  # raises on all ranks that train
                raise
            sync(failure)
            if batch is not None:
                images, features, _ = batch
                parts.append(Shard.of(images.to(device), features.to(device)))
    return Shard(torch.cat([part.images for part in parts]), torch.cat([part.features for part in parts]))


def exchange_errors(world: World) -> Sync:
    """Return a Sync that raises an error of one rank on all."""
    return lambda failure: raise_on_all_ranks(failure, world)
