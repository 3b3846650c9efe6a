"""Images of a user's Dataset: any object that returns an item for an index, also a Hugging Face dataset."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from fastsimclr.data.images import from_pil
from fastsimclr.data.labels import Label, as_label, encode_labels
from fastsimclr.data.pixels import RGB8, PixelFormat, default_format
from fastsimclr.data.sources import NO_LABEL, DecodedSource, WrongForm
from fastsimclr.errors import UserError
from fastsimclr.imports import describe_failure

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's from Python 3.11

_IMAGE_KEYS = ("image", "img", "pixel_values", "images")
_LABEL_KEYS = ("label", "labels", "target", "targets", "class", "class_id")
_TRIED = 100  # items read to find one that tells the format


class DatasetSource(DecodedSource):
    """Images of a Dataset, in the form of its first item.

    An item is an image, a tuple (image, label, ...) or a dict with an image and maybe a label. The image is a PIL image
    (converted to 8-bit RGB), a NumPy array (H, W, C) or (H, W), or a tensor (C, H, W) or (H, W): uint8, uint16 or
    float from 0 to 1. The label is an integer or a string. An item must depend only on its index.
    """

    thread_safe = False  # it may have one open file

    def __init__(self, dataset: Any, *, image_key: str = "", labels: Any = None, classes: Any = None) -> None:
        """image_key: key of the image in an item that is a dict; by default one of the usual names.

        labels, classes: labels (N,) and names of the classes; by default they are taken from the dataset.
        Raises UserError if the form of the items is none of those above.
        """
        self.dataset, self.title, self._image_key = dataset, type(dataset).__name__, image_key
        self._names = getattr(dataset, "classes", None) if classes is None else classes
        self.rows = np.arange(len(dataset))  # index of each image in `dataset`
        if len(self.rows) == 0:
            raise UserError(f"data: got {self.title} of length 0, expected images")
        self._reader: Any = None
        self.labels, self.classes = np.full(len(self.rows), NO_LABEL), ()
        self.labels_unread = False
        """Whether the labels are known only after all items were read; see `set_labels`."""
        self._form, first, label = self._find_form()
        self.pixels = self._form.pixels
        if labels is None and label is not None:
            labels = _known_labels(dataset)
            # The items' labels count: a target_transform may change those that the dataset lists.
            self.labels_unread = labels is None or str(labels[first]) != str(label)
        if labels is not None and not self.labels_unread:
            self.set_labels(labels)

    def name(self, index: int) -> str:
        return f"{self.title}[{self.rows[index]}]"

    def image(self, index: int) -> Tensor:
        return self.image_and_label(index)[0]

    def image_and_label(self, index: int) -> tuple[Tensor, Label]:
        """Return image `index` as (C, H, W), and its label as the item has it.

        Raises UserError if the Dataset raises, and WrongForm if the item has another form than the first.
        """
        form, image, label = self._read(index)
        if form != self._form:
            raise WrongForm(
                f"{self.name(index)}: got {form}, but {self._form} in other items; expected one form for all"
            )
        return image, label

    def set_labels(self, labels: Any) -> None:
        """Set the labels to those of the items (N,): integers, strings or None."""
        names = self._names if isinstance(self._names, list | tuple) else ()
        names = names if all(isinstance(name, str) for name in names) else ()
        self.labels, self.classes = encode_labels(labels, self.title, names)
        self.labels_unread = False

    def subset(self, indices: NDArray[np.int64]) -> "Self":
        part = self._part(indices)
        part.rows = self.rows[indices]
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_reader": None}

    def _find_form(self) -> tuple["_Form", int, Label]:
        """Return the form of the first item that can be read, its index and its label."""
        reasons = []
        for index in range(min(_TRIED, len(self))):
            try:
                form, _, label = self._read(index)
                return form, index, label
            except WrongForm:
                raise
            except UserError as error:
                reasons.append(str(error))
        raise UserError(f"data: got {len(reasons)} items of {self.title} that all fail, the first with {reasons[0]}")

    def _read(self, index: int) -> tuple["_Form", Tensor, Label]:
        name = self.name(index)
        if self._reader is None:
            # A copy keeps the files that a Dataset opens at first use out of `dataset`, which workers receive.
            try:
                self._reader = copy(self.dataset)
            except Exception:  # not possible for objects of some libraries, such as h5py
                self._reader = self.dataset
        try:
            image, label = self._split(self._reader[int(self.rows[index])], name)
            label = as_label(label, name)
            if isinstance(image, Image.Image):
                return _Form("a PIL image", RGB8), from_pil(image), label
        except UserError:
            raise
        except Exception as error:  # of the user's code
            raise UserError(f"{name}: {describe_failure(error)}") from error
        tensor = _to_tensor(image, name)
        kind = "a tensor" if isinstance(image, Tensor) else "a NumPy array"
        return _Form(kind, default_format(tensor.shape[0], tensor.dtype)), tensor, label

    def _split(self, item: Any, name: str) -> tuple[Any, Any]:
        """Return the image and the label of an item; None for no label."""
        if isinstance(item, Mapping):
            key = next((key for key in (self._image_key, *_IMAGE_KEYS) if key in item), None)
            if key is None:
                raise WrongForm(
                    f"{name}: got a dict with {', '.join(map(repr, item)) or 'no keys'}, expected the image by the key "
                    f"{_IMAGE_KEYS[0]!r} (or {', '.join(_IMAGE_KEYS[1:])})"
                )
            return item[key], next((item[key] for key in _LABEL_KEYS if key in item), None)
        if isinstance(item, list | tuple) and len(item):
            return item[0], item[1] if len(item) > 1 else None
        return item, None


class _Form(NamedTuple):
    """What all items of a Dataset have in common."""

    kind: str
    pixels: PixelFormat

    def __str__(self) -> str:
        dtype = str(self.pixels.dtype).removeprefix("torch.")
        return f"{self.kind} (channels: {self.pixels.channels}, {dtype})"


def _to_tensor(image: Any, name: str) -> Tensor:
    """Return a NumPy array (H, W, C) or (H, W), or a tensor (C, H, W) or (H, W), as a tensor (C, H, W)."""
    if not isinstance(image, np.ndarray | Tensor):
        raise WrongForm(f"{name}: got {type(image).__name__}, expected a PIL image, a NumPy array or a tensor")
    is_tensor = isinstance(image, Tensor)
    tensor = image.detach().cpu() if isinstance(image, Tensor) else _from_numpy(image, name)
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif tensor.ndim == 3 and not is_tensor:
        tensor = tensor.permute(2, 0, 1)
    if tensor.ndim != 3 or 0 in tensor.shape or tensor.shape[0] > 16:
        kind, order = ("a tensor", "(C, H, W)") if is_tensor else ("a NumPy array", "(H, W, C)")
        raise WrongForm(
            f"{name}: got {kind} of shape {tuple(image.shape)}, expected {order} or (H, W), with 1 to 16 channels"
        )
    if tensor.dtype.is_floating_point:
        tensor = tensor.to(torch.float32)
    if tensor.dtype not in (torch.uint8, torch.uint16, torch.float32):
        dtype = str(image.dtype).removeprefix("torch.")
        raise WrongForm(f"{name}: got pixels of {dtype}, expected uint8, uint16 or floats from 0 to 1: convert them")
    return tensor


def _from_numpy(image: NDArray[Any], name: str) -> Tensor:
    if image.dtype.kind not in "uifb":
        raise WrongForm(f"{name}: got pixels of {image.dtype}, expected uint8, uint16 or floats from 0 to 1")
    return torch.from_numpy(np.require(image, image.dtype.newbyteorder("="), ["C", "W"]))


def _known_labels(dataset: Any) -> NDArray[Any] | None:
    """Return the labels (N,) that a dataset lists in `targets` or `labels`, as those of torchvision do."""
    if isinstance(dataset, Subset):
        labels = _known_labels(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices)]
    for attribute in ("targets", "labels"):
        listed = getattr(dataset, attribute, None)
        if isinstance(listed, list | tuple | np.ndarray | Tensor) and len(listed) == len(dataset):
            labels = np.asarray(listed)
            if labels.ndim == 1 and labels.dtype.kind in "iuU":
                return labels
    return None


# Hugging Face


def is_hugging_face(data: Any) -> bool:
    """Return whether `data` is of the package datasets, without importing it."""
    return any(base.__module__.partition(".")[0] == "datasets" for base in type(data).__mro__) and (
        hasattr(data, "features") or isinstance(data, dict)
    )


def open_hugging_face(data: Any) -> DatasetSource:
    """Open a datasets.Dataset: its Image column, its ClassLabel column, and the names of the classes."""
    if isinstance(data, dict):
        splits = list(data)
        raise UserError(
            f"data: got {type(data).__name__} of the splits {', '.join(map(str, splits))}, expected one of them, such "
            f"as dataset[{splits[0]!r}]"
        )
    features = data.features
    image = _column(features, "Image", _IMAGE_KEYS)
    if image is None:
        raise UserError(f"data: got a dataset of the columns {', '.join(features)}, expected a column of images")
    label = _column(features, "ClassLabel", _LABEL_KEYS)
    if data.format["type"] is not None:  # a format or transform of the user's: it may use any column
        return DatasetSource(data, image_key=image)
    labels = None if label is None else data.with_format("numpy", columns=[label])[:][label]
    return DatasetSource(
        data.select_columns([image]), image_key=image, labels=labels, classes=getattr(features.get(label), "names", ())
    )


def _column(features: Mapping[str, Any], kind: str, names: Sequence[str]) -> str | None:
    """Return the column of feature type `kind`, of several the one with a usual name; else a column of such a name."""
    columns = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if len(columns) == 1:
        return columns[0]
    named = next((name for name in names if name in (columns or features)), None)
    if columns and named is None:
        raise UserError(
            f"data: got the {kind} columns {', '.join(columns)}, expected one: keep it with dataset.select_columns"
        )
    return named
