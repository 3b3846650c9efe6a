"""Worker processes: a DataLoader whose workers neither fork this process nor import its main module."""

import errno
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import weakref
from collections import ChainMap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver, parent_process, popen_forkserver, resource_tracker
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from multiprocessing.reduction import ForkingPickler
from pickle import PicklingError
from typing import Any, Generic, TypeVar

import cloudpickle
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from fastsimclr.errors import UserError
from fastsimclr.stopping import STOP_SIGNALS

Item = TypeVar("Item")
_STOP_WORKERS_S = 2.0
_PARENT = "FASTSIMCLR_FORKSERVER_PARENT"  # environment variable that worker_imports.py reads


class WorkerLoader(Generic[Item]):
    """Iterable of the items of `dataset` at the keys that `keys` yields, in that order, read ahead by the workers.

    workers: number of worker processes, kept between iterations; 0 reads in this process. They receive the dataset by
    value, also what the main module or a notebook defines; tensors are shared, and memory-mapped arrays are mapped
    again. Iterating raises UserError if the dataset cannot be sent to them.
    """

    def __init__(self, dataset: "Dataset[Item]", keys: Iterable[Any], workers: int, *, pin_memory: bool) -> None:
        self._loader: DataLoader[Item] = DataLoader(
            _ByValue(dataset) if workers else dataset,
            sampler=keys,
            batch_size=None,
            collate_fn=_no_collate,  # type: ignore[arg-type]  # the stub expects a list of items
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            multiprocessing_context=_forkserver() if workers else None,
            worker_init_fn=partial(_start_worker, dict(os.environ)),
        )
        # Also at exit, before multiprocessing's own handler, which sends SIGTERM to the workers and waits for them.
        self.close = weakref.finalize(self, _stop_workers, self._loader)

    def __iter__(self) -> Iterator[Item]:
        with uses_shared_memory():
            with _without_main_module():  # the workers are started here
                items = iter(self._loader)
            yield from items


@contextmanager
def uses_shared_memory() -> Iterator[None]:
    """Raise UserError if /dev/shm, which holds the data and the semaphores of worker processes, is too small."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
        if not is_full and not re.search("shared memory|bus error", str(error), re.IGNORECASE):
            raise
        size = shutil.disk_usage("/dev/shm").total / 2**20
        raise UserError(
            f"/dev/shm: got {size:.3g} MiB, too little for the batches of worker processes; expected more: start "
            "the container with --shm-size=8g or --ipc=host, or set --data.workers 0"
        ) from error


def _no_collate(item: Item) -> Item:
    return item


class _ByValue(Dataset[Item]):
    """Dataset that is unpickled as `dataset`."""

    def __init__(self, dataset: "Dataset[Item]") -> None:
        self._dataset = dataset

    def __getitem__(self, key: Any) -> Item:
        return self._dataset[key]

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        try:
            _Pickler(file).dump(self._dataset)
        except (TypeError, ValueError, AttributeError, PicklingError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"data: got images that cannot be sent to worker processes ({type(error).__name__}: {reason}); open "
                "files in __getitem__ instead of __init__, or set workers to 0"
            ) from error
        return cloudpickle.loads, (file.getvalue(),)


class _Pickler(cloudpickle.Pickler):
    """Pickles what the main module defines by value, tensors as handles to shared memory, and np.memmap as its file."""

    def __init__(self, file: io.BytesIO) -> None:
        shared = ForkingPickler(io.BytesIO()).dispatch_table  # multiprocessing's own, to which torch adds
        # Before __init__, which reads it.
        self.dispatch_table = ChainMap({np.memmap: _reduce_memmap}, super().dispatch_table, shared)
        super().__init__(file)


def _reduce_memmap(array: "np.memmap[Any, Any]") -> tuple[Any, ...]:
    whole = array
    while isinstance(whole.base, np.memmap):
        whole = whole.base
    if whole.filename is None:
        raise TypeError("memory-mapped array without the name of its file")
    start = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    return _map_again, (whole.filename, whole.offset + start, array.dtype, array.shape, array.strides)


def _map_again(
    file: str, offset: int, dtype: "np.dtype[Any]", shape: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[Any]:
    return np.ndarray(shape, dtype, np.memmap(file, np.uint8, "r"), offset, strides)


class _Popen(popen_forkserver.Popen):
    """Kills where it should terminate: workers ignore SIGTERM, and the parent's exit waits for those left."""

    terminate = popen_forkserver.Popen.kill


class _Worker(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> popen_forkserver.Popen:
        return _Popen(process_obj)


class _Context(ForkServerContext):
    Process = _Worker  # type: ignore[assignment]


def _forkserver() -> BaseContext:
    """Start a forkserver that has only imported the torchvision backend, and return its context.

    Forks of this process would copy locks held by threads of torch and DALI. Spawned workers take 370 MiB each and
    seconds for their imports; those of a forkserver share them.
    """
    context = _Context()
    context.set_forkserver_preload(["fastsimclr.data.worker_imports"])
    # A terminal or a scheduler sends stop signals to the whole process group. The processes started here inherit the
    # mask and ignore them, as the parent needs batches until it has stopped.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # again, as the tracker has unblocked some
        os.environ[_PARENT] = str(os.getpid())
        forkserver.ensure_running()
    except OSError as error:  # the path of a socket may have 107 bytes
        folder = tempfile.gettempdir()
        raise UserError(
            f"TMPDIR: got {folder} of {len(folder)} characters, where worker processes cannot start "
            f"({error.strerror or error}); expected a short path of a folder that can be written: set TMPDIR=/tmp, or "
            "--data.workers 0"
        ) from error
    finally:
        os.environ.pop(_PARENT, None)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep multiprocessing from importing the main script again in each worker.

    A script without `if __name__ == "__main__":` would otherwise open its loader again in every worker, and fail there.
    """
    main: Any = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), main.__spec__
    main.__file__ = main.__spec__ = None
    try:
        yield
    finally:
        main.__file__, main.__spec__ = file, spec


def _start_worker(environment: dict[str, str], _: int) -> None:
    """environment: of this process's parent; the forkserver's is as it was when that started."""
    os.environ.clear()
    os.environ.update(environment)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def exit_with_parent() -> None:
        """Wait for the parent: DataLoader's own watchdog watches the forkserver, which lives as long as its workers."""
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _stop_workers(loader: "DataLoader[Any]") -> None:
    iterator: Any = loader._iterator
    loader._iterator = None
    if iterator is None or not hasattr(iterator, "_shutdown_workers"):
        return

    def kill() -> None:
        for worker in iterator._workers:
            worker.kill()

    timer = threading.Timer(_STOP_WORKERS_S, kill)  # one may wait for storage for ever, and DataLoader 5 s for each
    timer.daemon = True
    timer.start()
    iterator._shutdown_workers()
    timer.cancel()
