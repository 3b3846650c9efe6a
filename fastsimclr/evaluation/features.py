"""Compute the representations of all images of a source, in its order, on all ranks."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsimclr.data import Source
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.dataset import open_loader
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.distributed import all_gather_rows, gather_sizes
from fastsimclr.errors import UserError
from fastsimclr.models import Backbone, Encoder, count_features
from fastsimclr.precision import autocast_to
from fastsimclr.progress_bar import progress_bar


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
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's part of each batch, on the CPU: the images' indices in the source (B,), representations (B, D)
    float32, and labels (B,).

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
            yield batch.index.cpu(), features, batch.label.cpu()
            bar.update(len(features) * config.world.world_size)
    finally:
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
) -> tuple[Tensor, Tensor]:
    """Return representations (N, D) float32 and labels (N,) of all images of `source`, in its order.

    Both are on the CPU, on every rank. The arguments are those of `embed_batches`.
    """
    width: int = encoder.out_features  # type: ignore[assignment]  # nn.Module: any attribute may be a tensor
    empty = torch.empty(0, dtype=torch.int64), torch.empty(0, width), torch.empty(0, dtype=torch.int64)
    rows = list(embed_batches(encoder, source, augmentation, config, autocast=autocast, title=title)) or [empty]
    index, features, labels = (torch.cat(column) for column in zip(*rows, strict=True))
    if config.world.world_size > 1:
        group = dist.group.WORLD
        assert group is not None
        sizes = gather_sizes(len(index), group, torch.device("cpu"))
        index, features, labels = (all_gather_rows(part, sizes, group) for part in (index, features, labels))
        order = index.argsort()
        features, labels = features[order], labels[order]
    return features, labels
