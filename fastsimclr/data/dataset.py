"""Open images for the commands, and loaders of augmented batches from them. No image is decoded that is not used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.backends import BACKENDS, choose_backend
from fastsimclr.data.cache_folder import cache_folder
from fastsimclr.data.check_results import use_results
from fastsimclr.data.detect import detect_pixels
from fastsimclr.data.loader import CropBackend, LoaderConfig, ViewLoader
from fastsimclr.data.memory import DifferentSizes, MemoryBackend, decode_all
from fastsimclr.data.opening import BUILT_IN, describe, listed_path, open_unread
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.data.pixels import count_channels
from fastsimclr.data.remote import use_local_cache
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.scan import check_same_images, check_values, read_labels
from fastsimclr.data.sources import ArraySource, EncodedSource, Source
from fastsimclr.data.statistics import with_statistics
from fastsimclr.data.storage_options import StorageOptions
from fastsimclr.data.subsets import split
from fastsimclr.distributed import SINGLE_PROCESS, World, run_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.node import run_once_per_node
from fastsimclr.progress_bar import print_line


class Pair(NamedTuple):
    """The images of a command."""

    train: Source
    val: Source | None


def open_dataset(
    train: Any,
    val: Any,
    *,
    world: World,
    backend: str = "auto",
    cache: str | Path | None = None,
    pixels: PixelOptions | None = None,
    storage: StorageOptions | None = None,
    select: Callable[[Source, Source | None], tuple[Source, Source | None]] = lambda train, val: (train, val),
    workers: int | None = None,
    seed: int = 0,
) -> Pair:
    """Open and prepare the training and validation images: `open_pair`, `select`, then `prepare_pair`.

    select: called with both sources before they are prepared; checks them, and may return subsets.
    Raises UserError on all ranks if data is missing, unreadable or rejected by `select`.
    """
    pair = open_pair(train, val, world, pixels, workers, seed, storage=storage, cache=cache)
    selected = run_on_all_ranks(lambda: select(*pair), world)
    return prepare_pair(Pair(*selected), world=world, backend=backend, cache=cache)


def open_pair(
    train: Any,
    val: Any,
    world: World,
    pixels: PixelOptions | None = None,
    workers: int | None = None,
    seed: int = 0,
    *,
    labels: bool = True,
    storage: StorageOptions | None = None,
    cache: str | Path | None = None,
) -> Pair:
    """Open the training and validation images without decoding files. Raises UserError on all ranks if one fails.

    train, val: as for `open_source`. If `val` is None, a built-in dataset uses its own validation images; if it is a
        fraction, that part of each class of the training images is held out, chosen by `seed`.
    pixels: what the images must be. Both must have the same format.
    workers: processes per rank that read the items of a Dataset; None picks by the number of CPU cores.
    labels: whether labels are needed: those of some Datasets are known only after all items are read.
    storage: how images at a URL are read. cache: the cache folder, --data.cache, for indexes of tar shards.
    """
    held_out = None
    if not isinstance(val, float) and (val is not None or is_built_in(train)):
        held_out = _open_once_per_node(train if val is None else val, "val", world, cache)
    opened = _open_once_per_node(train, "train", world, cache)

    def detect() -> None:
        use_local_cache(opened, storage or StorageOptions())
        detect_pixels(opened, pixels or PixelOptions())
        check_values(opened)
        if held_out is not None:
            use_local_cache(held_out, storage or StorageOptions())
            detect_pixels(held_out, pixels or PixelOptions())
            check_values(held_out)
            if held_out.pixels != opened.pixels:
                raise UserError(
                    f"--data.val: got images of {held_out.pixels}, expected {opened.pixels}, as in --data.train"
                )

    run_on_all_ranks(detect, world)
    for source, data in ((opened, train), (held_out, train if val is None else val)):
        if source is not None:
            if world.is_rank_zero:
                print_notes(source, data)
            check_same_images(source, world)
            if labels:
                read_labels(source, world, workers)
    if isinstance(val, float):
        return Pair(*run_on_all_ranks(lambda: split(opened, val, seed), world))
    return Pair(opened, held_out)


def _open_once_per_node(data: Any, split: str, world: World, cache: str | Path | None) -> Source:
    """Open images, with files listed by one rank of each node."""
    return run_once_per_node(lambda: open_unread(data, split, cache), listed_path(data), world)


def print_notes(source: Source, data: Any) -> None:
    """Print what was passed over when `data` was opened as `source`, and what its depth of pixels means."""
    for note in source.notes:
        print_line(f"{describe(data)}: {note}")


def prepare_pair(
    pair: Pair,
    *,
    world: World,
    backend: str = "auto",
    cache: str | Path | None = None,
) -> Pair:
    """Use the results of an earlier full check, choose the backend if it is "auto", and decode the images for "memory".

    cache: the cache folder, --data.cache. Raises UserError on all ranks if the images do not fit the backend.
    """
    train, val = (source and _prepare_on_all_ranks(source, world, backend, cache) for source in pair)
    assert train is not None
    return Pair(train, val)


def _prepare_on_all_ranks(source: Source, world: World, backend: str, cache: str | Path | None) -> Source:
    if isinstance(source, EncodedSource):
        use_results(source, cache_folder(cache), world)
    return run_on_all_ranks(lambda: prepare(source, backend, world)[0], world)


def is_built_in(data: Any) -> bool:
    """Return whether `data` names a built-in dataset, which has training and validation images."""
    return isinstance(data, str) and data.partition(":")[0] in BUILT_IN


def prepare(source: Source, backend: str, world: World) -> tuple[Source, str]:
    """Return the source (decoded if the backend is "memory") and the backend (chosen if it is "auto").

    Uses no collectives: all ranks choose the same, because they see the same images.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    chosen = choose_backend(source, world.device)[0] if backend == "auto" else backend
    if chosen != "memory" or isinstance(source, ArraySource):
        return source, chosen
    try:
        return decode_all(source, visible=world.is_rank_zero), chosen
    except DifferentSizes as error:
        if backend == "memory":
            raise
        source.sizes = error.sizes  # now "auto" knows
        chosen = choose_backend(source, world.device)[0]
        if world.is_rank_zero:
            print_line(f"data: the images are not of one size, so {chosen} loads them, not memory")
        return source, chosen


def open_views(
    data: Any,
    augmentation: Augmentation,
    batch_size: int,
    *,
    pixels: PixelOptions | None = None,
    storage: StorageOptions | None = None,
    cache: str | Path | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> ViewLoader:
    """Open a loader of augmented batches of images.

    It is an iterable of `Batch`, one epoch per iteration, with len(), set_epoch(), state_dict() and load_state_dict().

    data: a path: folder of class folders, flat folder of images, tar shards ("train-{000..127}.tar", "*.tar"),
        the same at a URL ("s3://bucket/train-{000..127}.tar"; folders not at https://),
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
    storage: how images at a URL are read, such as StorageOptions(local_cache="/local/cache").
    cache: folder of the results of `fastsimclr doctor --data`, which are used if they are there: by default,
        $XDG_CACHE_HOME/fastsimclr or ~/.cache/fastsimclr.
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
    source = open_unread(data, "train", cache)
    use_local_cache(source, storage or StorageOptions())
    detect_pixels(source, pixels or PixelOptions())
    check_values(source)
    read_labels(source, workers=config.workers)
    if isinstance(source, EncodedSource):
        use_results(source, cache_folder(cache), SINGLE_PROCESS)
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
    source, backend = prepare(source, config.backend, config.world)
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
        max_bad=config.max_bad,
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
