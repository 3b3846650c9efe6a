"""Labelled images for an evaluation: training and validation sets of the same classes, and subsets of the labels."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsimclr.config import DataConfig
from fastsimclr.data import Source
from fastsimclr.data.dataset import open_dataset
from fastsimclr.data.params import epoch_order
from fastsimclr.distributed import World
from fastsimclr.errors import UserError

_SUBSET, _HELD_OUT = 2**32 - 1, 2**32 - 2  # epochs that no run reaches: their orders are nobody else's
_SHOWN = 3  # names in an error


@dataclass(frozen=True)
class LabeledData:
    """Images whose labels are places in `classes`."""

    train: Source
    val: Source | None
    classes: Sequence[str]
    skipped: list[str]
    """What was wrong with each image left out, beginning with its name."""
    has_labels: int
    """Images of the training set before --labels, all of which have one."""


def open_labeled(data: DataConfig, labels: float | str, seed: int, cache: Path | None, world: World) -> LabeledData:
    """The images of --data.train with as many labels as --labels says, and those of --data.val, or else the built-in
    sets' own validation images; all that decode, found by all ranks together.

    labels: a fraction (the same number of each class, chosen by seed), or a file that lists the images to keep.
    cache: the folder that keeps the results of the scan for bad images.
    Raises UserError without labels, for classes that differ, and for bad images beyond --data.max_bad.
    """
    if data.train is None:
        raise UserError("--data.train: got none, expected labelled images: a folder of class folders, tar shards, …")
    available = 0

    def select(train: Source, val: Source | None) -> tuple[Source, Source | None]:
        nonlocal available
        for option, path, source in (("train", data.train, train), ("val", data.val, val)):
            if source is not None and not source.has_labels:
                raise UserError(f"--data.{option}: got {path}, whose images have no labels; expected class folders")
        if val is not None:
            _check_classes(train.classes, val.classes)
        train, val = _dense(train), val and _dense(val)
        available = len(train)
        kept = _listed(train, labels) if isinstance(labels, str) else class_balanced(train, labels, seed)
        return train if kept is None else train.subset(kept), val

    found = open_dataset(
        data.train, data.val, world=world, backend=data.backend, max_bad=data.max_bad, cache=cache, select=select
    )
    return LabeledData(found.train, found.val, found.train.classes, found.skipped or [], available)


def class_balanced(source: Source, fraction: float, seed: int) -> NDArray[np.int64] | None:
    """The places of a subset of `fraction` of the images with as many of each class, at least one: the same for the
    same seed everywhere. None for all. A class that has fewer gives all that it has."""
    if not 0 < fraction <= 1:
        raise UserError(f"--labels: got {fraction}, expected a fraction above 0, at most 1, or a file of image names")
    if fraction == 1:
        return None
    each = max(1, round(fraction * len(source) / len(source.classes)))
    return np.sort(np.concatenate([of_class[:each] for of_class in _by_class(source, seed, _SUBSET)]))


def hold_out(source: Source, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places of the images in two parts: all but `fraction` of each class, and that fraction of it."""
    classes = _by_class(source, seed, _HELD_OUT)
    counts = [int(fraction * len(of_class)) for of_class in classes]
    rest = [of_class[count:] for of_class, count in zip(classes, counts, strict=True)]
    held = [of_class[:count] for of_class, count in zip(classes, counts, strict=True)]
    return np.sort(np.concatenate(rest)), np.sort(np.concatenate(held))


def _by_class(source: Source, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The places of each class's images, in an order drawn by (seed, epoch, place)."""
    order = epoch_order(seed, epoch, len(source))
    return [order[source.labels[order] == label] for label in range(len(source.classes))]


def _listed(source: Source, file: str) -> NDArray[np.int64]:
    """The places of the images that `file` names, one a line, as the public 1 % and 10 % lists of ImageNet do: by
    their names alone (n01440764_10026.JPEG), or with their folder (n01440764/n01440764_10026.JPEG)."""
    try:
        listed = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels: got {file}, which is no number and cannot be read as a list of names") from error
    places: dict[str, list[int]] = {}
    for i in range(len(source)):
        parts = source.name(i).rpartition(": ")[2].split(os.sep)
        for name in {parts[-1], "/".join(parts[-2:])}:
            places.setdefault(name, []).append(i)
    found = [places.get("/".join(name.split("/")[-2:]), []) for name in listed]
    wrong = [name for name, at in zip(listed, found, strict=True) if len(at) != 1]
    if wrong or not listed:
        raise UserError(
            f"--labels: got a list, {file}, of {len(listed)} names of which {len(wrong)} are not those of one image of "
            f"--data.train ({', '.join(wrong[:_SHOWN])}); expected its images, as NAME or CLASS/NAME"
        )
    return np.unique(np.array([at[0] for at in found]))


def _check_classes(train: Sequence[str], val: Sequence[str]) -> None:
    differences = [f"{name} in train alone" for name in sorted(set(train) - set(val))]
    differences += [f"{name} in val alone" for name in sorted(set(val) - set(train))]
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise UserError(
            f"--data.val: got other classes than --data.train has ({', '.join(differences[:_SHOWN])}{more}); "
            "expected the same"
        )


def _dense(source: Source) -> Source:
    """The source with each label the place of its class: a tar's may be numbers with gaps."""
    if source.labels.max() < len(source.classes):
        return source
    dense = source.subset(np.arange(len(source)))
    dense.labels = np.searchsorted(np.array(source.classes, dtype=np.int64), source.labels)
    return dense
