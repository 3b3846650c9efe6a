"""Subsets of labeled images, chosen by class and seed: the same on every machine and for any number of ranks."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from fastsimclr.data.params import epoch_order
from fastsimclr.data.sources import EncodedSource, Source
from fastsimclr.errors import UserError

_SUBSET, _SAMPLE = 2**32 - 1, 2**32 - 2  # epochs that no run reaches: random orders that nothing else uses
_SHOWN = 3  # classes listed in an error


def class_balanced(source: Source, fraction: float, seed: int) -> NDArray[np.int64] | None:
    """Return the indices of a random subset of `fraction` of the images with the same number per class, at least one.

    A class with fewer images contributes all of them. The subset depends only on the seed. Returns None for all images.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--labels: got {fraction}, expected a fraction above 0, at most 1, or a file of image names")
    if fraction == 1:
        return None
    per_class = max(1, round(fraction * len(source) / len(source.classes)))
    classes = _by_class(source, epoch_order(seed, _SUBSET, len(source)))
    return np.sort(np.concatenate([of_class[:per_class] for of_class in classes]))


def sample(source: Source, images: int | None, seed: int) -> Source:
    """Return a random subset of at most `images` images, in the order of the source; None: all of them.

    Every class keeps its share: of a class with c of N images, c * images / N are chosen, rounded up or down.
    """
    if images is None or images >= len(source):
        return source
    grouped = np.concatenate(_by_class(source, epoch_order(seed, _SAMPLE, len(source))))
    return source.subset(np.sort(grouped[np.arange(images) * len(source) // images]))


def hold_out(source: Source, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the images by class; returns the indices of the rest, and of the held-out `fraction` of each class.

    An image's rank within its class is a hash of the seed and its name, so files that are added or removed later move
    no other files from one part to the other, except a few at the boundary.
    """
    name = source.key if isinstance(source, EncodedSource) else str
    hashes = [
        blake2b(f"{seed} {name(index)}".encode(errors="surrogateescape"), digest_size=8).digest()
        for index in range(len(source))
    ]
    classes = _by_class(source, np.argsort(np.array(hashes, dtype="S8").view(">u8"), kind="stable"))
    counts = [int(fraction * len(of_class)) for of_class in classes]
    rest = [of_class[count:] for of_class, count in zip(classes, counts, strict=True)]
    held = [of_class[:count] for of_class, count in zip(classes, counts, strict=True)]
    return np.sort(np.concatenate(rest)), np.sort(np.concatenate(held))


def split(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Split labeled images into training images and the held-out `fraction` of each class: --data.val 0.1."""
    if not source.has_labels:
        raise UserError(
            f"--data.val: got {fraction:g}, but the images have no labels, which kNN accuracy needs; expected class "
            "folders, or none"
        )
    rest, held_out = hold_out(source, fraction, seed)
    if not len(held_out):
        most = np.unique(source.labels, return_counts=True)[1].max()
        raise UserError(
            f"--data.val: got {fraction:g}, which is not one image of any class, as the largest has {most}; "
            f"expected at least {1 / most:.2g}"
        )
    return source.subset(rest), source.subset(held_out)


def class_indices(source: Source, classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the label of each image (N,) as an index into `classes`, matched by the names of the classes.

    `classes` names all classes of the source, in any order. Unlabeled images keep -1.
    """
    position = {name: index for index, name in enumerate(classes)}
    labels, inverse = np.unique(source.labels, return_inverse=True)
    # A name that is not in `classes` is a label for which a user gave a number as the name.
    indices = [position.get(source.class_name(label), label) if label >= 0 else label for label in labels.tolist()]
    return np.array(indices, np.int64)[inverse]


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


def _by_class(source: Source, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the indices of each class's images, in the given order of all images."""
    grouped = order[np.argsort(source.labels[order], kind="stable")]
    return np.split(grouped, np.flatnonzero(np.diff(source.labels[grouped])) + 1)
