"""The labels of images in tar shards.

of x/0.v2.jpg: the text of x/0.v2.cls or, by its key, of x/0.cls; else "label" or "cls" in the .json member of that
name, or the .json itself if it is a number. -1 or nothing: no label.
Where no image has such a label: its folder, if there are several. ./0.jpg is in no folder.
Integers stay what they are; beside the shards, classes.txt may name them, a line for each from 0 on. Other labels are
the names of classes, which are sorted.
"""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.names import Names
from fastsimclr.data.sources import NO_LABEL
from fastsimclr.data.tar_headers import Archive
from fastsimclr.errors import UserError

CLASSES_FILE = "classes.txt"
LABEL_ENDINGS = (b".cls", b".json")


def read_label(path: str, name: bytes, content: bytes) -> str | None:
    """Return the label in a .cls or .json member. "": it says that there is none. None: it says nothing of labels."""
    if name.endswith(b".cls"):
        try:
            return _as_label(content.decode().strip())
        except UnicodeDecodeError as error:
            text = f"{path}: {os.fsdecode(name)}: got a label that is no text, expected a number or the name of a class"
            raise UserError(text) from error
    if b'"label"' not in content and b'"cls"' not in content and not content.strip().lstrip(b"-").isdigit():
        return None  # most, as of captions: parsing would take longer than all else
    try:
        value = json.loads(content)
    except ValueError:
        return None
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
    return _as_label(str(value)) if isinstance(value, int | str) and not isinstance(value, bool) else None


def _as_label(text: str) -> str:
    return "" if text == str(NO_LABEL) else text


def label_of(archive: Archive, key: bytes) -> str | None:
    """Return the label of the image whose name without its ending, or sample key, is `key`; None: none is given."""
    text = archive.texts.get(key + b".cls")
    return archive.texts.get(key + b".json") if text is None else text


def labels_by_folder(names: Names) -> tuple[NDArray[np.int64], list[str | None]]:
    """Return the positions (N,) of the images' labels in the list that is returned, of the names of their folders."""
    texts: dict[str | None, int] = {}

    @functools.cache  # there are far fewer folders than images
    def position(folder: str) -> int:
        return texts.setdefault(_folder_name(folder), len(texts))

    labels = [position(name[: name.rfind("/") + 1]) for name in names]
    return np.array(labels, np.int64), list(texts)


def _folder_name(path: str) -> str | None:
    """Return the name of a folder of members. None for the top: that of ./0.jpg."""
    name = os.path.basename(os.path.normpath(path))
    return None if name in ("", ".", "..") else name


def number_classes(texts: Sequence[str], shards: Sequence[str]) -> tuple[dict[str | None, int], list[str], bool]:
    """Return the label of each text but "", the classes, and whether these are names by label."""
    names = sorted(text for text in texts if text)
    if not all(name.isascii() and name.isdigit() and len(name) < 19 for name in names):
        return {name: label for label, name in enumerate(names)}, names, True
    values: dict[str | None, int] = {name: int(name) for name in names}
    used = sorted(set(values.values()))
    file = Path(shards[0]).with_name(CLASSES_FILE)
    if used and {Path(shard).parent for shard in shards} == {file.parent} and file.is_file():
        named = file.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n").split("\n")
        if len(named) <= used[-1]:
            raise UserError(
                f"{file}: got {len(named)} names of classes for labels up to {used[-1]}, expected a line each"
            )
        return values, named, True
    return values, [str(label) for label in used], False
