"""What was found in tar shards, kept as one file: opening them again reads no header."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsimclr.data.cache_folder import write_to_cache
from fastsimclr.data.names import Names
from fastsimclr.data.sources import TarSource
from fastsimclr.data.urls import is_url

INDEX_FILE = "index.npz"  # beside the shards
_VERSION = 1  # of the file and of the rules in tars.py
MIN_IMAGES = 10_000  # on disk, fewer are found as fast


def index_file(folder: Path, shards: Sequence[str]) -> Path:
    """Return the index of these shards in the cache folder."""
    paths = b"\0".join(os.fsencode(shard if is_url(shard) else os.path.realpath(shard)) for shard in shards)
    return folder / "tars" / f"{hashlib.blake2b(paths, digest_size=16).hexdigest()}.npz"


def stamps_of(files: Sequence[str]) -> list[tuple[int, int]]:
    """Return the size and the time of the last change of files. Raises OSError."""
    return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]


def load_index(file: Path, shards: Sequence[str], stamps: Sequence[tuple[int, int]]) -> TarSource | None:
    """Return the images of the shards from an index. None if there is none, or one of other, changed or no shards."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:  # which leaks a damaged file
            about = json.loads(arrays["about"].tobytes())
            if about["version"] != _VERSION or about["stamps"] != [list(stamp) for stamp in stamps]:
                return None
            source = TarSource(
                shards, Names(arrays["text"], arrays["ends"]), arrays["extents"], arrays["labels"], about["classes"]
            )
            source.classes_are_names, source.notes = about["classes_are_names"], about["notes"]
            return source
    except Exception:  # any defect of the file: the headers are read again
        return None


def save_index(file: Path, source: TarSource, stamps: Sequence[tuple[int, int]]) -> None:
    """Write the images of a source as the index of its shards. Where that fails, a note on stderr says so."""
    about = {
        "version": _VERSION,
        "stamps": stamps,
        "classes": source.classes,
        "classes_are_names": source.classes_are_names,
        "notes": source.notes,
    }
    text, ends = source.members.arrays()

    def write(partial: Path) -> None:
        with partial.open("wb") as stream:  # savez would append its own ending to a path
            np.savez(
                stream,
                about=np.frombuffer(json.dumps(about).encode(), np.uint8),
                text=text,
                ends=ends,
                extents=source.extents,
                labels=source.labels,
            )

    write_to_cache(file, write)
