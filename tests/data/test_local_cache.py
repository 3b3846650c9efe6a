"""The cache of remote images on a local disk: its limit, the order of eviction, damaged entries, other processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fastsimclr.data import local_cache
from fastsimclr.data.local_cache import LocalCache
from fastsimclr.errors import UserError

BLOCK = 4096  # an entry's size on disk is a multiple of it
ENTRY = 2 * BLOCK

WRITER = """
import sys
from pathlib import Path
from test_local_cache import ENTRY, content
from fastsimclr.data.local_cache import LocalCache
cache = LocalCache(sys.argv[1], 40 * ENTRY)
print("started", flush=True)
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    found = cache.get(f"entry {number}")
    assert found is None or (found == content(number)).all()
    cache.put(f"entry {number}", content(number))
"""


def content(number: int) -> NDArray[np.uint8]:
    """Return the bytes of an entry that takes ENTRY on disk."""
    return np.random.default_rng(number).integers(0, 256, ENTRY - 100, np.uint8)


def files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.name != "usage"]


def on_disk(folder: Path) -> int:
    total = 0
    for file in files(folder):
        with contextlib.suppress(FileNotFoundError):  # evicted by another process
            total += -(-file.stat().st_size // BLOCK) * BLOCK
    return total


def test_entries_are_kept_up_to_the_limit_and_the_oldest_evicted(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 100 * ENTRY)
    for number in range(500):
        cache.put(f"entry {number}", content(number % 7))
        if number >= 20:
            assert cache.get(f"entry {number % 20}") is not None, "an entry in use was evicted"
        assert number % 50 or on_disk(tmp_path) <= 100 * ENTRY
    kept = [number for number in range(500) if cache.get(f"entry {number}") is not None]
    assert 90 <= len(kept) <= 100
    assert kept == [*range(20), *range(520 - len(kept), 500)]
    cache.put("larger than the cache", np.zeros(101 * ENTRY, np.uint8))
    assert cache.get("larger than the cache") is None


def test_a_large_cache_evicts_the_oldest_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_cache, "_SAMPLE", 50)
    cache = LocalCache(tmp_path, 250 * ENTRY)
    for number in range(500):
        cache.put(f"entry {number}", content(number % 7))
        assert number % 50 or on_disk(tmp_path) <= 250 * ENTRY
    kept = np.array([number for number in range(500) if cache.get(f"entry {number}") is not None])
    assert len(kept) > 200
    assert (kept >= 250).mean() > 0.85


def test_damaged_entries_are_removed_and_replaced(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 100 * ENTRY)
    for damage in ("flip", "truncate", "empty", "other"):
        cache.put("entry", content(0))
        (file,) = files(tmp_path)
        data = bytearray(file.read_bytes())
        data[500] ^= 1
        file.write_bytes({"flip": data, "truncate": data[:-700], "empty": b"", "other": b"x" * len(data)}[damage])
        assert cache.get("entry") is None
        assert files(tmp_path) == []
    cache.put("entry", content(0))
    assert (LocalCache(tmp_path, 100 * ENTRY).get("entry") == content(0)).all()


def test_the_usage_is_counted_again_if_it_is_lost(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 10 * ENTRY)
    for number in range(10):
        cache.put(f"entry {number}", content(number))
    (tmp_path / "remote_images" / "usage").unlink()
    for number in range(10, 20):
        cache.put(f"entry {number}", content(number))
        assert on_disk(tmp_path) <= 10 * ENTRY


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--data.local_cache: got .* be written to \(Not a directory\)"):
        LocalCache(tmp_path / "file", 1)


@pytest.mark.slow  # starts processes
def test_processes_share_it_and_may_be_killed(tmp_path: Path) -> None:
    """Three processes write the same entries; one is killed over and over. No entry is wrong, the limit holds."""

    def start() -> "subprocess.Popen[str]":
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", WRITER, str(tmp_path), "0", "500"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    rng = np.random.default_rng(0)
    others = [start(), start()]
    killed = 0
    while any(other.poll() is None for other in others):
        writer = start()
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        writer.send_signal(signal.SIGKILL)
        killed += writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        assert on_disk(tmp_path) <= 41 * ENTRY  # 40, and one that appeared during the count
    for other in others:
        assert other.wait() == 0
        assert other.stdout is not None
        other.stdout.close()
    assert killed > 0
    cache = LocalCache(tmp_path, 40 * ENTRY)
    kept = {number: cache.get(f"entry {number}") for number in range(500)}
    assert all(found is None or (found == content(number)).all() for number, found in kept.items())
    assert 30 <= sum(found is not None for found in kept.values()) <= 40
