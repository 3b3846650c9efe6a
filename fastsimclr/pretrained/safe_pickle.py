"""Read the tensors of other projects' checkpoints without ever running code from a file."""

import contextlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from fastsimclr.errors import UserError

# Modules of the configurations, logs and numbers that checkpoints hold beside the weights. They are never imported: a
# placeholder replaces every object from them.
_REPLACED_MODULES = (
    *("argparse", "datetime", "numpy", "omegaconf", "pathlib", "typing"),
    *("lightning", "lightning_fabric", "pytorch_lightning"),
    *("classy_vision", "mmcv", "mmengine", "solo", "vissl"),
)
_REPLACED_NAMES = {
    "collections.defaultdict",
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
}
# torch.load(weights_only=True) allows these. It also checks the names in PyTorch's own modules.
_ALLOWED = {"collections.OrderedDict", "collections.Counter", "_codecs.encode"}
_ALLOWED |= {"builtins.bytearray", "builtins.complex", "builtins.set"}


class _Placeholder(list[Any]):
    """Replaces an object while unpickling and accepts any operation; keeps only the items of a list."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]  # a path may be a dict key
        return id(self)


class _DictPlaceholder:
    """Replaces a subclass of dict: PyTorch's unpickler sets items only of the dict types it knows."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def read_foreign(path: Path) -> Any:
    """Load a file that torch.save wrote, on the CPU. Never runs code from the file or imports modules that it names.

    Placeholders replace objects other than tensors, numbers, strings and containers of them. Raises UserError if the
    file is not a checkpoint, or names anything that may be code.
    """
    try:
        names = _names_in(path)
        replaced = {name for name in names if name.split(".")[0] in _REPLACED_MODULES} | (names & _REPLACED_NAMES)
        refused = [name for name in names - replaced - _ALLOWED if not name.startswith("torch.")]
        if refused:
            raise _would_import(path, refused)
        placeholders: list[Any] = [
            (_DictPlaceholder if name.lower().endswith("dict") else _Placeholder, name) for name in replaced
        ]
        with torch.serialization.safe_globals(placeholders), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old file formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: got a file that cannot be read ({reason}), expected a checkpoint") from error
    except Exception as error:  # arbitrary bytes may raise any exception
        unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and unknown:
            raise _would_import(path, [unknown[1]]) from error
        raise UserError(
            f"{path}: got a file that is damaged or not a checkpoint, expected one that torch.save wrote"
        ) from error


def _would_import(path: Path, names: list[str]) -> UserError:
    listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return UserError(
        f"{path}: got a pickle that would import {listed}, which may be code, so it was not loaded; expected "
        "tensors: save the model's state_dict() in the project that wrote the file"
    )


def _names_in(path: Path) -> set[str]:
    """The classes and functions that a file's pickles name, found without running them."""
    names: set[str] = set()
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(4):  # before PyTorch 1.6: consecutive pickles, of which the fourth is the object
                names |= _names_in_pickle(file)
            return names
        with zipfile.ZipFile(file) as archive:
            files = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in files):
                raise UserError(
                    f"{path}: got a TorchScript program, expected weights: save the state_dict() of the module that "
                    "torch.jit.load returns"
                )
            for name in files:
                if name.endswith("/data.pkl"):
                    names |= _names_in_pickle(io.BytesIO(archive.read(name)))
    return names


def _names_in_pickle(file: Any) -> set[str]:
    """The names in the next pickle of `file`, as in Python 3. Unpickling refuses any name that this misses."""
    names: set[str] = set()
    texts = ["", ""]
    with contextlib.suppress(Exception):  # torch.load reports what is wrong
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "GLOBAL":
                module, name = str(argument).split(" ", 1)
                module = "builtins" if module == "__builtin__" else module
                names.add("builtins.int" if (module, name) == ("builtins", "long") else f"{module}.{name}")
            elif operation.name == "STACK_GLOBAL":
                names.add(".".join(texts))
            elif isinstance(argument, str):
                texts = [texts[1], argument]
    # Bytes that are not a pickle may look like imports of invalid names.
    return {name for name in names if all(part.isidentifier() for part in name.split("."))}
