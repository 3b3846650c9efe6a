"""Paths of images in the record of a run, which may be read in another folder."""

import os

from fastsimclr.data.opening import BUILT_IN, is_object
from fastsimclr.imports import is_object_reference


def absolute_path(data: str) -> str:
    """Return what --data.train or --data.val names, with an absolute path if it has one.

    That is the path of a folder, a file or tar shards, which may be a pattern; the file of mydata.py:NAME; or the
    folder of cifar10:ROOT. Names of built-in datasets, modules and objects and URLs have none.
    """
    name, _, root = data.partition(":")
    if name in BUILT_IN:
        return f"{name}:{_absolute(root)}" if root else data
    if is_object(data) or "://" in data:
        return data
    if is_object_reference(data):
        file, _, name = data.rpartition(":")
        return f"{_absolute(file)}:{name}" if file.endswith(".py") else data
    return _absolute(data)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
