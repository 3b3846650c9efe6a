"""Open a data set once for every command, and loaders of augmented batches on it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.backends import BACKENDS, choose_backend
from fastsimclr.data.loader import CropBackend, LoaderConfig, ViewLoader
from fastsimclr.data.memory import MemoryBackend, decode_all
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.scan import SKIPPED_FILE, BadImages, write_skipped_images
from fastsimclr.data.scan import scan as scan_images  # `scan` is the module
from fastsimclr.data.sources import BUILT_IN, ArraySource, EncodedSource, Source, open_source
from fastsimclr.distributed import World, run_on_all_ranks
from fastsimclr.errors import UserError

Pair = tuple[Source, Source | None]


@dataclass(frozen=True)
class Dataset:
    """Images that decode, ready to be loaded by the backend that was asked for."""

    train: Source
    val: Source | None
    skipped: list[str] | None
    """What is wrong with each image left out, starting with its name; None: no files had to be checked."""


def open_dataset(
    train: str,
    val: str | None,
    *,
    world: World,
    backend: str = "auto",
    max_bad: float = 0.01,
    cache: Path | None = None,
    skipped_to: Path | None = None,
    select: Callable[[Source, Source | None], Pair] = lambda train, val: (train, val),
    stop: Callable[[], bool] = lambda: False,
    option: str = "--data.max_bad",
) -> Dataset:
    """Open, check and prepare images to train on and to validate on. All ranks share the work and fail together.

    train, val: paths as of `open_source`. Without `val`, a built-in set brings its own validation images.
    backend: of the loaders to come; for "memory" the images are decoded here, once.
    max_bad: the largest fraction of files that may be bad. They are left out.
    cache: the folder that keeps the scan's results. skipped_to: the folder to list bad images in.
    select: checks the two sources, and may replace them by parts of them, before the scan.
    stop: asked during the scan; once true on any rank, all raise ScanStopped.
    option: what `max_bad` is called in an error.
    Raises UserError on all ranks for data that is missing, unreadable, or refused by `select`.
    """

    def opened() -> Pair:
        held_out = None
        if val is not None or is_built_in(train):
            held_out = open_source(val or train, split="val")
        return select(open_source(train), held_out)

    sources = run_on_all_ranks(opened, world)
    skipped: list[str] | None = None
    checked: list[Source | None] = []
    for source in sources:
        if isinstance(source, EncodedSource):
            try:
                scanned = scan_images(source, max_bad=max_bad, cache=cache, world=world, stop=stop)
            except BadImages as error:
                where = ""
                if skipped_to is not None:
                    where = f" ({skipped_to / SKIPPED_FILE} names all)"
                    if world.is_rank_zero:
                        write_skipped_images(skipped_to, [*(skipped or []), *error.bad])
                raise UserError(f"{option}{str(error).removeprefix('max_bad')}{where}") from error
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


def is_built_in(path: str) -> bool:
    """Whether this names a built-in set, which has a training and a validation part."""
    return path.partition(":")[0] in BUILT_IN


def prepare(source: Source, backend: str, device: torch.device) -> tuple[Source, str]:
    """The source as `backend` takes it, decoded for "memory", and the backend, chosen for "auto"."""
    if backend not in BACKENDS:
        raise UserError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend, _ = choose_backend(source, device)
    if backend == "memory" and isinstance(source, EncodedSource):
        source = decode_all(source)
    return source, backend


def open_views(
    path: str | Source,
    augmentation: Augmentation,
    batch_size: int,
    *,
    max_bad: float | None = None,
    cache: str | Path | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> ViewLoader:
    """Augmented batches of the images at `path`: an iterable with len(), set_epoch(), state_dict(), load_state_dict().

    path: a folder of class folders, a flat folder, tar shards ("train-{000..127}.tar", "*.tar"), "digits",
        "cifar10[:ROOT]", "stl10[:ROOT]", or a Source.
    batch_size: images per batch, over all ranks; each rank gets its part. The last batch may be smaller.
    max_bad: decode every image first, and leave out those that fail, if they are at most this fraction (otherwise
        UserError). None: no scan; the first image that does not decode raises UserError when it is reached.
    cache: a folder that keeps the scan's results for the next one.
    device: where views are made and delivered.
    options: the fields of `fastsimclr.data.loader.LoaderConfig`: backend ("auto", "dali", "torchvision" or "memory"),
        seed, shuffle, drop_last, min_local_batch, workers, dtype.

    Yields Batch(views: tuple of (B, 3, H, W) channels-last, index: (B,), label: (B,), position).
    Raises UserError (a ValueError) for missing or unreadable data, and for options that do not fit it.
    """
    world = World(rank, world_size, torch.device(device))
    config = LoaderConfig(batch_size=batch_size, world=world, **options)
    source = open_source(path) if isinstance(path, str) else path
    if max_bad is not None and isinstance(source, EncodedSource):
        source = scan_images(source, max_bad=max_bad, cache=cache).source
    return open_loader(source, augmentation, config)


def open_loader(source: Source, augmentation: Augmentation, config: LoaderConfig) -> ViewLoader:
    """A loader of these images."""
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
    return ViewLoader(source, augmentation, sampler, crop_backend, config.world.device, config.dtype, backend)


def _open_file_backend(backend: str, source: Source, augmentation: Augmentation, config: LoaderConfig) -> CropBackend:
    from fastsimclr.data.torchvision import TorchvisionBackend, default_workers

    workers = default_workers(source, config.world.device) if config.workers is None else config.workers
    if backend == "torchvision":
        return TorchvisionBackend(source, augmentation, config.world.device, workers)
    try:
        from fastsimclr.data.dali import DaliBackend
    except ImportError as error:
        raise UserError(
            f"backend: got dali, but it is not installed ({error}); pip install nvidia-dali-cuda130, or use torchvision"
        ) from error
    largest = -(-config.batch_size // config.world.world_size)
    return DaliBackend(source, augmentation, config.world.device, largest, max(1, workers))
