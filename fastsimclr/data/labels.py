"""Labels of a user's images: integers, or names that become classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsimclr.data.sources import NO_LABEL, WrongForm

Label = int | str | None
"""Label of one image: a class index, the name of a class, or None for an unlabeled image."""


def as_label(value: Any, name: str) -> Label:
    """Return the label `value` of image `name`. Raises WrongForm if it is neither an integer nor a string."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, torch.Tensor | np.generic | np.ndarray):
        array = np.asarray(value)
        if array.ndim == 0 and array.dtype.kind in "iubU":
            value = array.item()
    if isinstance(value, str):
        return value
    if not isinstance(value, int):
        text = f"{value!r} " if isinstance(value, int | float | complex) else ""
        raise WrongForm(
            f"{name}: got label {text}of type {type(value).__name__}, expected an integer or the name of a class; "
            "return only the image to train without labels"
        )
    return int(value)


def encode_labels(values: Any, title: str, names: Sequence[str] = ()) -> tuple[NDArray[np.int64], Sequence[str]]:
    """Return labels (N,), -1 for unlabeled images, and the names of the classes, as a source has them.

    values: (N,) integers, strings (the classes are then those strings, sorted) or a mix of either with None.
    title: what has the labels, in an error. names: names of the classes of integers. If they are too few, classes are
    named by their numbers, as those of tar shards are.
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise WrongForm(f"{title}: got labels of shape {array.shape}, expected one integer or name per image: (N,)")
    if array.dtype.kind == "O":
        kinds = {type(as_label(value, f"{title}[{index}]")) for index, value in enumerate(array)} - {type(None)}
        if len(kinds) > 1:
            raise WrongForm(f"{title}: got labels of which some are integers and some are names; expected one kind")
        missing = "" if kinds == {str} else NO_LABEL
        array = np.array([missing if value is None else value for value in array])
    if array.dtype.kind in "UT":
        found = [str(name) for name in np.unique(array) if name]
        return np.where(array == "", NO_LABEL, np.searchsorted(found, array)), found
    if array.dtype.kind not in "iub":
        raise WrongForm(f"{title}: got labels of {array.dtype}, expected integers or names of classes")
    labels = array.astype(np.int64)
    if labels.min() < NO_LABEL:
        where = int(labels.argmin())
        raise WrongForm(f"{title}[{where}]: got label {labels[where]}, expected 0 or above, or -1 for no label")
    used = np.unique(labels[labels != NO_LABEL])
    if len(used) and len(names) > used[-1]:
        return labels, list(names)
    return labels, [str(label) for label in used.tolist()]
