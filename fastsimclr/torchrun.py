"""Ranks of processes that torchrun starts: they do not outlive it, and those that it restarts find each other."""

import os
import threading
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from fastsimclr.progress_bar import print_line

_THREAD = "fastsimclr-torchrun"


def end_with_torchrun() -> None:
    """End this process when torchrun, its parent, has been killed: otherwise it would train on unattended.

    srun's daemon ends its tasks itself. Other parents, such as a shell under nohup, may end.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    torchrun = os.getppid()

    def watch() -> None:
        while os.getppid() == torchrun:
            time.sleep(1)
        print_line(f"rank {os.environ['RANK']}: torchrun was killed; this process ends, too")
        os._exit(1)

    threading.Thread(target=watch, name=_THREAD, daemon=True).start()


def without_old_keys(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return `store` with a prefix that only these processes have.

    torchrun's store outlives them: after `--max-restarts` has started new ones, torch would connect them to the
    addresses of the old ones. TORCHELASTIC_RESTART_COUNT is no prefix, as it differs between nodes. Each rank therefore
    asks under a name of its own, which rank 0 answers with its prefix, until all have confirmed that one.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"question of rank {rank}", own)
        prefix = store.get(f"answer to {own}").decode()
        store.set(f"{prefix}/confirmed by rank {rank}", "")
        return dist.PrefixStore(prefix, store)
    deadline = time.monotonic() + timeout.total_seconds()
    for other in range(1, world_size):
        while not store.check([f"{own}/confirmed by rank {other}"]):
            if store.check([question := f"question of rank {other}"]):  # may still be that of an old process
                store.set(f"answer to {store.get(question).decode()}", own)
            if time.monotonic() > deadline:
                raise RuntimeError(f"timed out: rank {other} did not come")
            time.sleep(0.01)
    return dist.PrefixStore(own, store)
