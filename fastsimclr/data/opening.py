"""Open images: files, tar shards, built-in datasets, and objects of the user's own.

a folder of class folders    train/daisy/1.jpg               label: index of the class folder in sorted order
a flat folder of images      photos/1.jpg                    no labels
tar shards                   'train-{000..127}.tar', '*.tar' label: NAME.cls beside NAME.jpg, else see tars.py
digits                       scikit-learn's 1,797 handwritten digits, 80 % of each class for training
cifar10[:ROOT]               CIFAR-10 through torchvision, from ROOT or downloaded to it
stl10[:ROOT]                 STL-10 likewise; most of its 105,000 training images are unlabeled
array.npy                    (N, H, W, C) or (N, H, W), memory-mapped; labels: (N,) in array.labels.npy, if that exists
mydata.py:make_dataset       an object of the user's code, or what it returns when called; also package.module:object

Objects: a Dataset with __len__ and __getitem__, a Hugging Face dataset, an array (N, H, W, C), a pair (images, labels)
of arrays, a list of image files, or a Source.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from fastsimclr.data.arrays import is_array, open_array, open_array_file
from fastsimclr.data.cache_folder import cache_folder
from fastsimclr.data.datasets import DatasetSource, is_hugging_face, open_hugging_face
from fastsimclr.data.folders import open_folder, open_listed
from fastsimclr.data.remote import RemoteFiles
from fastsimclr.data.remote_requests import examine_files, list_files
from fastsimclr.data.scan import read_labels
from fastsimclr.data.sources import NO_LABEL, ArraySource, EncodedSource, FolderSource, Source
from fastsimclr.data.tars import expand, is_tar_path, open_indexed, open_tars, read_shards
from fastsimclr.data.urls import is_url, query_of, without_query
from fastsimclr.errors import UserError
from fastsimclr.imports import describe_failure, import_object, is_object_reference

BUILT_IN = ("digits", "cifar10", "stl10")
_OBJECT = "object:"
_EXPECTED = "a folder of images, tar shards, digits, cifar10[:ROOT], stl10[:ROOT], array.npy or mydata.py:object"


def open_source(data: Any, *, split: str = "train") -> Source:
    """Open images. Raises UserError if they do not exist or have another form.

    data: a path in any of the forms above, or an object. split: "train" or "val", for built-in datasets only.
    If the labels of a Dataset can only be known by reading all of its items, they are all read.
    """
    source = open_unread(data, split)
    read_labels(source)
    return source


def open_unread(data: Any, split: str, cache: str | Path | None = None) -> Source:
    """Open images like `open_source`, but leave labels unread that need all items of a Dataset: see `read_labels`.

    cache: the cache folder, --data.cache, for the indexes of tar shards.
    """
    assert split in ("train", "val"), split
    if isinstance(data, Source):
        return data
    if not isinstance(data, str | os.PathLike):
        return _open_object(data)
    path = os.fspath(data)
    if not path.strip():
        raise UserError(f"data: got an empty path, perhaps of an unset variable; expected {_EXPECTED}")
    if is_object(path):
        raise UserError(
            f"{path.removeprefix(_OBJECT)}: got the name of an object that a Python program passed to pretrain(), "
            f"expected {_EXPECTED}: pass the images again, or --data.train on the command line"
        )
    if is_url(path):
        return _open_url(without_query(path), cache_folder(cache))
    kind, _, root = path.partition(":")
    if path == "digits":
        return _digits(split)
    if kind in ("cifar10", "stl10"):
        return _from_torchvision(kind, os.path.expanduser(root) or "data", split)
    if is_object_reference(path):
        return open_unread(_call(import_object(path), path), split, cache)
    folder = Path(path).expanduser()
    if folder.is_file() and folder.suffix == ".npy":
        return open_array_file(str(folder))
    if not folder.is_dir():
        if is_tar_path(path):
            return open_tars(expand(path), cache_folder(cache))
        got = "a file" if folder.exists() else "nothing at that path"
        raise UserError(f"{path}: got {got}, expected {_EXPECTED}")
    return open_folder(str(folder))


def listed_path(data: Any) -> str | None:
    """Return the path, from the root, or the URL of data whose opening lists files; None for other data."""
    if not isinstance(data, str | os.PathLike) or not os.fspath(data).strip():
        return None
    path = os.fspath(data)
    is_other = path.partition(":")[0] in BUILT_IN or path.endswith(".npy") or is_object_reference(path)
    return None if is_other else path if "://" in path else os.path.join(os.getcwd(), path)


def describe(data: Any) -> str:
    """Return the path of images, or for an object a name that `open_source` does not open, for the record of a run."""
    if isinstance(data, str | os.PathLike):
        return without_query(os.fspath(data))
    return f"{_OBJECT}{type(data).__name__}"


def is_object(path: str) -> bool:
    """Return whether `describe` has named an object, which is not a path, by this."""
    return path.startswith(_OBJECT)


def _call(imported: Any, reference: str) -> Any:
    """Return the data of an imported object: what a function without arguments returns, or an instance of a class."""
    if not callable(imported) or (hasattr(imported, "__getitem__") and not isinstance(imported, type)):
        return imported
    try:
        return imported()
    except Exception as error:  # of the user's code
        raise UserError(
            f"{reference}: got an object that fails when called without arguments: {describe_failure(error)}"
        ) from error


def _open_object(data: Any) -> Source:
    if is_array(data):
        return open_array(data)
    if isinstance(data, list | tuple) and data:
        if all(isinstance(file, str | os.PathLike) for file in data):
            return FolderSource(list(map(os.fspath, data)), np.full(len(data), NO_LABEL), ())
        if len(data) == 2 and is_array(data[0]) and data[0].ndim >= 3 and np.ndim(data[1]) == 1:
            return open_array(*data)
    kind = type(data)
    if isinstance(data, IterableDataset) or not (hasattr(kind, "__getitem__") and hasattr(kind, "__len__")):
        raise UserError(
            f"data: got {kind.__name__}, which does not return an image by its index; expected a map-style Dataset "
            "with __len__ and __getitem__: add them, or write the images to tar shards"
        )
    if is_hugging_face(data):
        return open_hugging_face(data)
    if isinstance(data, Mapping):
        raise UserError(f"data: got {kind.__name__}, expected a Dataset, an array or a pair (images, labels)")
    return DatasetSource(data)


def _open_url(url: str, cache: Path) -> EncodedSource:
    if is_tar_path(url):
        shards, query = expand(url), query_of(url)
        files = RemoteFiles(examine_files(shards, query), query)
        stamps = [files.stat(shard) for shard in shards]
        source: EncodedSource = open_indexed(shards, stamps, cache, lambda: read_shards(shards, files.open_shard))
    else:
        root = url.rstrip("/")
        found = list_files(root)
        files = RemoteFiles(found)
        source = open_listed(root, [name.removeprefix(f"{root}/") for name in found])
    source.storage = files
    return source


def _digits(split: str) -> ArraySource:
    """Open 8x8 handwritten digits, resized to 32x32 RGB. Every fifth image of each class is held out for "val"."""
    from sklearn.datasets import load_digits  # lazy: the import takes a second

    data = load_digits()
    labels = data.target.astype(np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        held_out[np.flatnonzero(labels == label)[::5]] = True
    resized = [
        np.asarray(Image.fromarray(digit).resize((32, 32), Image.Resampling.BICUBIC))
        for digit in np.rint(data.images * (255 / 16)).astype(np.uint8)
    ]
    selected = held_out if split == "val" else ~held_out
    images = torch.from_numpy(np.stack(resized)[selected])[..., None].repeat(1, 1, 1, 3)
    return ArraySource("digits", images, labels[selected], [str(d) for d in range(10)])


def _from_torchvision(name: str, root: str, split: str) -> ArraySource:
    from torchvision.datasets import CIFAR10, STL10  # lazy: the import is slow

    try:  # downloads only missing files
        if name == "cifar10":
            cifar = CIFAR10(root, train=split == "train", download=True)
            return ArraySource(name, torch.from_numpy(cifar.data), np.array(cifar.targets), cifar.classes)
        stl = STL10(root, split="train+unlabeled" if split == "train" else "test", download=True)
    except Exception as error:  # network and disk errors of many kinds
        title, folder = ("CIFAR-10", "cifar-10-batches-py") if name == "cifar10" else ("STL-10", "stl10_binary")
        raise UserError(
            f"{name}:{root}: got no {title} in that folder and could not download it ({str(error).splitlines()[0]}); "
            f"expected {folder} in it"
        ) from error
    images = torch.from_numpy(stl.data).permute(0, 2, 3, 1).contiguous()
    return ArraySource(name, images, stl.labels.astype(np.int64), stl.classes)
