"""Labeled images for an evaluation: training and validation sets of the same classes, and subsets of the labels."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsimclr.config import DataConfig
from fastsimclr.data import Source
from fastsimclr.data.dataset import open_dataset
from fastsimclr.data.subsets import check_classes, class_balanced, class_indices
from fastsimclr.distributed import World
from fastsimclr.errors import UserError
from fastsimclr.pretrained import Pretrained

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
        return [line for source in sources for line in source.describe_bad()]


def open_labeled(data: DataConfig, labels: float | str, seed: int, world: World, *, split_seed: int = 0) -> LabeledData:
    """Open the labeled images of --data.train and --data.val.

    Without --data.val, a built-in dataset uses its own validation images.

    labels: the fraction of the labels to use (the same number per class, chosen by seed), or a file that lists the
        images to keep.
    split_seed: seed of the held-out images if --data.val is a fraction.
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
            val = _with_classes(val, train.classes)
        train = _with_classes(train, train.classes)
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
        storage=data.storage_options(),
        select=select,
        seed=split_seed,
    )
    return LabeledData(train, val, train.classes, available)


@contextmanager
def explain_recorded_path(checkpoint: str | Path | None, pretrained: Pretrained | None) -> Iterator[None]:
    """Add to an error about images, if their path is from the checkpoint, that this is where it comes from."""
    recorded = (pretrained.config if pretrained is not None else None) or {}
    paths = [path for path in map(recorded.get("data", {}).get, ("train", "val")) if isinstance(path, str)]
    try:
        yield
    except UserError as error:
        if not str(error).startswith(tuple(f"{path}: " for path in paths)):
            raise
        raise UserError(
            f"{error}. The path is that of the training of {checkpoint}: if the images have moved, give theirs"
        ) from error


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


def _with_classes(source: Source, classes: Sequence[str]) -> Source:
    """Return the source with labels that index `classes`."""
    indexed = copy(source)
    indexed.labels, indexed.classes = class_indices(source, classes), classes
    return indexed
