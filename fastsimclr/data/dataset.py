"""Open images, and loaders of augmented batches on them."""

from pathlib import Path

import torch

from fastsimclr.data.augmentation import Views
from fastsimclr.data.backends import BACKENDS, choose_backend
from fastsimclr.data.loader import Front, ViewLoader
from fastsimclr.data.memory import MemoryFront, decode_all
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.scan import scan as scan_images  # `scan` is the module
from fastsimclr.data.sources import ArraySource, EncodedSource, Source, open_source
from fastsimclr.errors import UserError


def open_views(
    path: str | Source,
    views: Views,
    batch_size: int,
    *,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    min_local_batch: int = 1,
    workers: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_bad: float | None = None,
    cache: str | Path | None = None,
) -> ViewLoader:
    """Augmented batches of the images at `path`: an iterable with len(), set_epoch(), state_dict(), load_state_dict().

    path: a folder of class folders, a flat folder, tar shards ("train-{000..127}.tar", "*.tar"), "digits",
        "cifar10[:ROOT]", "stl10[:ROOT]", or a Source.
    batch_size: images a batch, over all ranks; each rank gets its part. The last batch may be smaller (or is dropped,
        with `drop_last`, or where some rank would have fewer than `min_local_batch` images of it).
    backend: "dali" (on a GPU, or its CPU operators), "torchvision" (a DataLoader), "memory" (images of one size,
        decoded once and kept on the device); "auto": memory for the built-in sets and for small images that a scan has
        found to be of one size, else dali on a GPU and torchvision without one.
    device: where views are made and delivered.
    seed: of the order and of every draw. Views are the same for every backend but for how it resamples (a level).
    shuffle: a new order each epoch; else the source's.
    workers: DataLoader processes, or DALI threads; None chooses by the machine.
    dtype: of the views.
    max_bad: try every image first, and leave out those that do not decode, if they are at most this fraction (else
        UserError). None: no scan; the first that does not decode is a UserError when it is met.
    cache: a folder where what the scan found is kept, and found again.

    Yields Batch(views: tuple of (B, 3, H, W) channels-last, index: (B,), label: (B,)).
    Raises UserError (a ValueError) for missing or unreadable data, and for options that do not fit it.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    device = torch.device(device)
    source = open_source(path) if isinstance(path, str) else path
    if max_bad is not None and isinstance(source, EncodedSource):
        source = scan_images(source, max_bad=max_bad, cache=cache).source
    source, backend = prepare(source, backend, device)
    sampler = Sampler(len(source), batch_size, rank, world_size, seed, shuffle, drop_last, min_local_batch)
    front: Front
    if backend == "memory":
        assert isinstance(source, ArraySource)
        front = MemoryFront(source, views, device)
    else:
        front = _file_front(backend, source, views, sampler, device, workers)
    return ViewLoader(source, views, sampler, front, device, dtype, backend)


def prepare(source: Source, backend: str, device: torch.device) -> tuple[Source, str]:
    """The source as `backend` takes it, decoded for memory, and the backend, chosen for "auto". A source that several
    loaders are opened on is so decoded once."""
    if backend == "auto":
        backend, _ = choose_backend(source, device)
    if backend == "memory" and isinstance(source, EncodedSource):
        source = decode_all(source)
    return source, backend


def _file_front(
    backend: str,
    source: Source,
    views: Views,
    sampler: Sampler,
    device: torch.device,
    workers: int | None,
) -> Front:
    from fastsimclr.data.torchvision import TorchvisionFront, default_workers

    if workers is None:
        workers = default_workers(source, device)
    if backend == "torchvision":
        return TorchvisionFront(source, views, device, workers)
    try:
        from fastsimclr.data.dali import DaliFront
    except ImportError as error:
        raise UserError(
            f"backend: got dali, but it is not installed ({error}); pip install nvidia-dali-cuda130, or use torchvision"
        ) from error
    largest = -(-sampler.batch_size // sampler.world_size)
    return DaliFront(source, views, device, largest, max(1, workers))
