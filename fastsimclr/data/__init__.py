"""The data path: `open_views` gives an iterable of augmented batches, whatever the data and whoever decodes it."""

import importlib.util

import torch

from fastsimclr.data.loader import Batch, Front, ViewLoader
from fastsimclr.data.sampler import Sampler
from fastsimclr.data.sources import ArraySource, Source, open_source
from fastsimclr.errors import UserError
from fastsimclr.views import Views

__all__ = ["Batch", "Source", "ViewLoader", "choose_backend", "open_source", "open_views"]

BACKENDS = ("auto", "dali", "torchvision", "memory")


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
) -> ViewLoader:
    """Augmented batches of the images at `path`: an iterable with len(), set_epoch(), state_dict(), load_state_dict().

    path: a folder of class folders, a flat folder, tar shards ("train-{000..127}.tar", "*.tar"), "digits",
        "cifar10[:ROOT]", or a Source.
    batch_size: images a batch, over all ranks; each rank gets its part. The last batch may be smaller (or is dropped,
        with `drop_last`, or where some rank would have fewer than `min_local_batch` images of it).
    backend: "dali" (on a GPU, or its CPU operators), "torchvision" (a DataLoader), "memory" (digits and CIFAR-10, kept
        decoded on the device); "auto": memory for those, else dali on a GPU and torchvision without one.
    device: where views are made and delivered.
    seed: of the order and of every draw. Views are the same for every backend but for how it resamples (a level).
    shuffle: a new order each epoch; else the source's.
    workers: DataLoader processes, or DALI threads; None chooses by the machine.

    Yields Batch(views: tuple of (B, 3, H, W) float32 channels-last, index: (B,), label: (B,)).
    Raises UserError (a ValueError) for missing or unreadable data, and for options that do not fit it.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    device = torch.device(device)
    source = open_source(path) if isinstance(path, str) else path
    sampler = Sampler(len(source), batch_size, rank, world_size, seed, shuffle, drop_last, min_local_batch)
    if backend == "auto":
        backend, _ = choose_backend(source, device)
    return ViewLoader(source, views, sampler, _front(backend, source, views, sampler, device, workers), device, backend)


def choose_backend(source: Source, device: torch.device) -> tuple[str, str]:
    """What "auto" takes, and why."""
    if isinstance(source, ArraySource):
        return "memory", "the images are small and decoded"
    if device.type != "cuda":
        return "torchvision", "without a GPU it decodes as fast as DALI"
    # Of a package within one that is not there find_spec does not say None, it raises.
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "torchvision", "DALI is not installed"
    return "dali", "it decodes on the GPU"


def _front(
    backend: str, source: Source, views: Views, sampler: Sampler, device: torch.device, workers: int | None
) -> Front:
    from fastsimclr.data.torchvision import TorchvisionFront, default_workers

    if backend == "memory":
        from fastsimclr.data.memory import MemoryFront

        if not isinstance(source, ArraySource):
            raise UserError(
                "backend: got memory for image files, expected dali or torchvision (memory: digits, cifar10)"
            )
        return MemoryFront(source, views, device)
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
