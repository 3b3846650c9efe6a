"""Open a dataset, and loaders of augmented batches from it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.backends import BACKENDS, choose_backend
from fastsimclr.data.detect import detect_pixels
from fastsimclr.data.loader import CropBackend, LoaderConfig, ViewLoader
from fastsimclr.data.memory import MemoryBackend, decode_all
from fastsimclr.data.opening import BUILT_IN, describe, listed_path, open_unread
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.pixels import count_channels
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.scan import (
    SKIPPED_FILE,
    BadImages,
    check_same_images,
    needs_scan,
    read_labels,
    write_skipped_images,
)
from fastsimclr.data.scan import scan as scan_images  # `scan` is the module
from fastsimclr.data.sources import ArraySource, Source
from fastsimclr.data.statistics import with_statistics
from fastsimclr.distributed import World, run_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.node import run_once_per_node
from fastsimclr.progress_bar import print_line

Pair = tuple[Source, Source | None]


@dataclass(frozen=True)
class Dataset:
    """Checked images, prepared for the requested backend."""

    train: Source
    val: Source | None
    skipped: list[str] | None
    """One line per skipped image, its name and the reason; None if there were no files to check."""


def open_dataset(
    train: Any,
    val: Any,
    *,
    world: World,
    backend: str = "auto",
    max_bad: float = 0.01,
    cache: Path | None = None,
    skipped_to: Path | None = None,
    pixels: PixelOptions | None = None,
    select: Callable[[Source, Source | None], Pair] = lambda train, val: (train, val),
    option: str = "--data.max_bad",
    workers: int | None = None,
) -> Dataset:
    """Open, check and prepare the training and validation images: `open_pair`, `select`, then `check_pair`.

    select: called with both sources before the scan; checks them, and may return subsets.
    Raises UserError on all ranks if data is missing, unreadable or rejected by `select`.
    """
    pair = open_pair(train, val, world, pixels, workers)
    pair = run_on_all_ranks(lambda: select(*pair), world)
    return check_pair(
        pair,
        world=world,
        backend=backend,
        max_bad=max_bad,
        cache=cache,
        skipped_to=skipped_to,
        option=option,
        workers=workers,
    )


def open_pair(
    train: Any, val: Any, world: World, pixels: PixelOptions | None = None, workers: int | None = None
) -> Pair:
    """Open the training and validation images without decoding files. Raises UserError on all ranks if one fails.

    train, val: as for `open_source`. If `val` is None, a built-in dataset uses its own validation images.
    pixels: what the images must be. Both must have the same format.
    """
    held_out = None
    if val is not None or is_built_in(train):
        held_out = _open_once_per_node(train if val is None else val, "val", world)
    opened = _open_once_per_node(train, "train", world)

    def detect() -> None:
        detect_pixels(opened, pixels or PixelOptions())
        if held_out is not None:
            detect_pixels(held_out, pixels or PixelOptions())
            if held_out.pixels != opened.pixels:
                raise UserError(
                    f"--data.val: got images of {held_out.pixels}, expected {opened.pixels}, as in --data.train"
                )

    run_on_all_ranks(detect, world)
    for source in (opened, held_out):
        if source is not None:
            check_same_images(source, world)
            read_labels(source, world, workers)
    return opened, held_out


def _open_once_per_node(data: Any, split: str, world: World) -> Source:
    """Open images, with files listed by one rank of each node. Rank 0 prints what was passed over."""
    source = run_once_per_node(lambda: open_unread(data, split), listed_path(data), world)
    if world.is_rank_zero:
        print_notes(source, data)
    return source


def print_notes(source: Source, data: Any) -> None:
    """Print what was passed over when `data` was opened as `source`."""
    for note in source.notes:
        print_line(f"{describe(data)}: {note}")


def check_pair(
    pair: Pair,
    *,
    world: World,
    backend: str = "auto",
    max_bad: float = 0.01,
    cache: Path | None = None,
    skipped_to: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    option: str = "--data.max_bad",
    workers: int | None = None,
) -> Dataset:
    """Scan the images for bad ones and prepare them for the backend. All ranks share the work and fail together.

    backend: backend of the loaders; for "memory" the images are decoded here, once.
    max_bad: largest fraction of images that may fail to decode. They are skipped.
    cache: folder for the results of the scan. skipped_to: folder for the list of skipped images.
    stop: called during the scan; once it returns True on any rank, all ranks raise ScanStopped.
    option: name of `max_bad` in error messages.
    workers: processes per rank that read the items of a Dataset; None picks by the number of CPU cores.
    Raises UserError on all ranks if too many images are bad.
    """
    skipped: list[str] | None = None
    checked: list[Source | None] = []
    for source in pair:
        if source is not None and needs_scan(source):
            try:
                scanned = scan_images(source, max_bad=max_bad, cache=cache, world=world, stop=stop, workers=workers)
            except BadImages as error:
                list_file = ""
                if skipped_to is not None:
                    list_file = f" (all are listed in {skipped_to / SKIPPED_FILE})"
                    if world.is_rank_zero:
                        write_skipped_images(skipped_to, [*(skipped or []), *error.bad])
                raise UserError(f"{option}{str(error).removeprefix('max_bad')}{list_file}") from error
            source = scanned.source
            skipped = list(dict.fromkeys([*(skipped or []), *scanned.bad]))  # `val` may be `train`
        checked.append(source)
    if skipped is not None and skipped_to is not None and world.is_rank_zero:
        write_skipped_images(skipped_to, skipped)
    prepared, prepared_val = run_on_all_ranks(
        lambda: [source and prepare(source, backend, world.device)[0] for source in checked], world
    )
    assert prepared is not None
    return Dataset(prepared, prepared_val, skipped)


def is_built_in(data: Any) -> bool:
    """Return whether `data` names a built-in dataset, which has training and validation images."""
    return isinstance(data, str) and data.partition(":")[0] in BUILT_IN


def prepare(source: Source, backend: str, device: torch.device) -> tuple[Source, str]:
    """Return the source (decoded if the backend is "memory") and the backend (chosen if it is "auto")."""
    if backend not in BACKENDS:
        raise UserError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend, _ = choose_backend(source, device)
    if backend == "memory" and not isinstance(source, ArraySource):
        source = decode_all(source)
    return source, backend


def open_views(
    data: Any,
    augmentation: Augmentation,
    batch_size: int,
    *,
    pixels: PixelOptions | None = None,
    max_bad: float | None = None,
    cache: str | Path | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> ViewLoader:
    """Open a loader of augmented batches of images.

    It is an iterable of `Batch`, one epoch per iteration, with len(), set_epoch(), state_dict() and load_state_dict().

    data: a path: folder of class folders, flat folder of images, tar shards ("train-{000..127}.tar", "*.tar"),
        "digits", "cifar10[:ROOT]", "stl10[:ROOT]", "array.npy" (memory-mapped; labels in array.labels.npy), or an
        object of your own code: "mydata.py:make_dataset" or "package.module:object".
        Or an object: a list of image files; a Dataset with __len__ and __getitem__, of images, (image, label, ...)
        tuples or dicts; a Hugging Face dataset; an array or tensor (N, H, W, C) or (N, H, W) of uint8, uint16 or
        float32 (from 0 to 1), which may be an np.memmap; a pair of such an array and labels (N,); or a Source.
        Images of a Dataset are PIL images, NumPy arrays (H, W, C) or tensors (C, H, W); labels are integers or names.
        An item must depend only on its index. If only the items have the labels, all are read first.
    augmentation: recipe of the views.
    batch_size: global batch size, images per batch over all ranks; each rank gets its share. The last batch may be
        smaller.
    pixels: what image files are decoded to; 8-bit RGB by default. `augmentation.mean` and `std` must have one number
        per channel or be "auto".
    max_bad: if given, decode every image first and skip those that fail; raise UserError if they are more than this
        fraction. None: no scan; an image that does not decode is replaced by another one when it is reached.
    cache: folder in which the results of the scan are kept for the next one.
    device: device on which views are computed and returned.
    rank, world_size: this process and the number of processes that share each batch.
    options: fields of `fastsimclr.data.loader.LoaderConfig`: backend ("auto", "dali", "torchvision" or "memory"), seed,
        shuffle, drop_last, min_local_batch, workers, dtype, read_ahead.

    Yields Batch(views: tuple of (B, C, H, W) channels-last, index: (B,), label: (B,), position, replaced: (B,)), B on
    this rank. An image that cannot be used is replaced by another one: see `ViewLoader.bad`.
    Raises UserError (a ValueError) for missing or unreadable data and for invalid options.
    """
    world = World(rank, world_size, torch.device(device))
    config = LoaderConfig(batch_size=batch_size, world=world, **options)
    source = open_unread(data, "train")
    detect_pixels(source, pixels or PixelOptions())
    read_labels(source, workers=config.workers)
    if needs_scan(source) and (max_bad is not None or isinstance(source, ArraySource)):
        source = scan_images(source, max_bad=max_bad or 0, cache=cache, workers=config.workers).source
    check_augmentation(augmentation, source)
    augmentation, _ = with_statistics(augmentation, source)
    return open_loader(source, augmentation, config)


def check_augmentation(augmentation: Augmentation, source: Source) -> None:
    """Raise UserError unless the augmentation is for images of the source's channels."""
    try:
        augmentation.check_channels(source.pixels.channels)
    except ValueError as error:
        raise UserError(f"--data.{error}") from error


def open_loader(source: Source, augmentation: Augmentation, config: LoaderConfig) -> ViewLoader:
    """Open a loader of augmented batches from `source`. The augmentation's mean and std must be known."""
    if augmentation.channels != source.pixels.channels:
        raise UserError(
            f"data: got images of {source.pixels}, expected {count_channels(augmentation.channels)}, the length of mean"
        )
    source, backend = prepare(source, config.backend, config.world.device)
    sampler = Sampler(
        len(source),
        config.batch_size,
        config.world.rank,
        config.world.world_size,
        config.seed,
        config.shuffle,
        config.drop_last,
        config.min_local_batch,
    )
    crop_backend: CropBackend
    if backend == "memory":
        assert isinstance(source, ArraySource)
        crop_backend = MemoryBackend(source, augmentation, config.world.device)
    else:
        crop_backend = _open_file_backend(backend, source, augmentation, config)
    return ViewLoader(
        source,
        augmentation,
        sampler,
        crop_backend,
        config.world.device,
        config.dtype,
        backend,
        read_ahead=config.read_ahead,
    )


def _open_file_backend(backend: str, source: Source, augmentation: Augmentation, config: LoaderConfig) -> CropBackend:
    from fastsimclr.data.torchvision import TorchvisionBackend, default_workers

    workers = default_workers(source, config.world.device) if config.workers is None else config.workers
    if backend == "torchvision":
        return TorchvisionBackend(source, augmentation, config.world.device, workers)
    try:
        from fastsimclr.data.dali import DaliBackend
    except ImportError as error:
        raise UserError(
            f"backend: got dali, which is not installed ({error}); pip install nvidia-dali-cuda130, or use torchvision"
        ) from error
    max_local_batch = -(-config.batch_size // config.world.world_size)
    return DaliBackend(source, augmentation, config.world.device, max_local_batch, max(1, workers))
