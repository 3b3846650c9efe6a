"""Labeled images for an evaluation: training and validation sets of the same classes, and subsets of the labels."""

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

_SUBSET, _HELD_OUT = 2**32 - 1, 2**32 - 2  # epochs that no run reaches: random orders that nothing else uses
_SHOWN = 3  # names listed in an error


@dataclass(frozen=True)
class LabeledData:
    """Images whose labels are indices into `classes`."""

    train: Source
    val: Source | None
    classes: Sequence[str]
    available_images: int
    """Number of training images before --labels selects a subset."""

    @property
    def skipped(self) -> list[str]:
        """For each image left out, its name and the reason."""
        sources = [self.train] if self.val is None else [self.train, self.val]
        return [f"{source.name(index)}: {reason}" for source in sources for index, reason in source.bad.items()]


def open_labeled(data: DataConfig, labels: float | str, seed: int, world: World) -> LabeledData:
    """Open the labeled images of --data.train and --data.val.

    Without --data.val, a built-in dataset uses its own validation images.

    labels: the fraction of the labels to use (the same number per class, chosen by seed), or a file that lists the
        images to keep.
    Raises UserError if images have no labels, or if the classes of the two differ.
    """
    if data.train is None:
        raise UserError("--data.train: got none, expected labeled images: a folder of class folders, tar shards, …")
    available = 0

    def select(train: Source, val: Source | None) -> tuple[Source, Source | None]:
        nonlocal available
        for option, path, source in (("train", data.train, train), ("val", data.val, val)):
            if source is not None and not source.has_labels:
                raise UserError(f"--data.{option}: got {path}, whose images have no labels; expected class folders")
        if val is not None:
            check_classes(train.classes, val.classes)
        train, val = _dense(train), val and _dense(val)
        available = len(train)
        kept = _listed(train, labels) if isinstance(labels, str) else class_balanced(train, labels, seed)
        return train if kept is None else train.subset(kept), val

    train, val = open_dataset(
        data.train,
        data.val,
        world=world,
        backend=data.backend,
        cache=data.cache,
        pixels=data.pixel_options(),
        select=select,
    )
    return LabeledData(train, val, train.classes, available)


def class_balanced(source: Source, fraction: float, seed: int) -> NDArray[np.int64] | None:
    """Return the indices of a random subset of `fraction` of the images with the same number per class, at least one.

    A class with fewer images contributes all of them. The subset depends only on the seed. Returns None for all images.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--labels: got {fraction}, expected a fraction above 0, at most 1, or a file of image names")
    if fraction == 1:
        return None
    per_class = max(1, round(fraction * len(source) / len(source.classes)))
    return np.sort(np.concatenate([of_class[:per_class] for of_class in _by_class(source, seed, _SUBSET)]))


def hold_out(source: Source, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the images by class; returns the indices of the rest, and of the held-out `fraction` of each class."""
    classes = _by_class(source, seed, _HELD_OUT)
    counts = [int(fraction * len(of_class)) for of_class in classes]
    rest = [of_class[count:] for of_class, count in zip(classes, counts, strict=True)]
    held = [of_class[:count] for of_class, count in zip(classes, counts, strict=True)]
    return np.sort(np.concatenate(rest)), np.sort(np.concatenate(held))


def _by_class(source: Source, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The indices of each class's images, in a random order that depends only on the seed and the epoch."""
    order = epoch_order(seed, epoch, len(source))
    return [order[source.labels[order] == label] for label in range(len(source.classes))]


def _listed(source: Source, file: str) -> NDArray[np.int64]:
    """The indices of the images that `file` lists, one per line, as in the public 1 % and 10 % lists of ImageNet.

    A line is a file name (n01440764_10026.JPEG), or a folder and a file name (n01440764/n01440764_10026.JPEG).
    """
    try:
        listed = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels: got {file}, which is neither a number nor a readable list of names") from error
    indices: dict[str, list[int]] = {}
    for i in range(len(source)):
        parts = source.name(i).rpartition(": ")[2].split(os.sep)
        for name in {parts[-1], "/".join(parts[-2:])}:
            indices.setdefault(name, []).append(i)
    found = [indices.get("/".join(name.split("/")[-2:]), []) for name in listed]
    wrong = [name for name, at in zip(listed, found, strict=True) if len(at) != 1]
    if wrong or not listed:
        raise UserError(
            f"--labels: got {file} with {len(listed)} names, {len(wrong)} of which do not match exactly one image of "
            f"--data.train ({', '.join(wrong[:_SHOWN])}); expected names of its images, as NAME or CLASS/NAME"
        )
    return np.unique(np.array([at[0] for at in found]))


def check_classes(train: Sequence[str], val: Sequence[str]) -> None:
    """Raise UserError unless both lists name the same classes."""
    differences = [f"{name} only in train" for name in sorted(set(train) - set(val))]
    differences += [f"{name} only in val" for name in sorted(set(val) - set(train))]
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise UserError(
            f"--data.val: got classes that differ from --data.train's ({', '.join(differences[:_SHOWN])}{more}); "
            "expected the same classes"
        )


def _dense(source: Source) -> Source:
    """The source with labels that index its classes: the labels of tar shards may have gaps."""
    if source.labels.max() < len(source.classes):
        return source
    dense = source.subset(np.arange(len(source)))
    dense.labels = np.searchsorted(np.array(source.classes, dtype=np.int64), source.labels)
    return dense
