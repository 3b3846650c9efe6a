"""Read other projects' checkpoints: only the tensors are wanted, and nothing in a file is ever run."""

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

# Where configurations, logs and numbers beside the weights come from. Nothing of these modules is imported, let alone
# called: a stand-in takes the place of whatever the file names.
_STOOD_IN_FOR = (
    *("argparse", "datetime", "numpy", "omegaconf", "pathlib", "typing"),
    *("lightning", "lightning_fabric", "pytorch_lightning"),
    *("classy_vision", "mmcv", "mmengine", "solo", "vissl"),
)
_STOOD_IN_FOR_ALONE = {
    "collections.defaultdict",
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
}
# PyTorch stands for these: it refuses what it does not know of its own modules.
_KNOWN = {"collections.OrderedDict", "collections.Counter", "_codecs.encode"}
_KNOWN |= {"builtins.bytearray", "builtins.complex", "builtins.set"}


class _StandIn(list[Any]):
    """Takes the place of an object that is not wanted, whatever is done to it in unpickling; holds nothing of it but
    the items of a list."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]  # a path may be a key
        return id(self)


class _StandInDictionary:
    """Takes the place of a subclass of dict: PyTorch sets items of its own kinds of dict alone."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def read_foreign(path: Path) -> Any:
    """What any project's torch.save wrote, on the CPU, with stand-ins for objects that are neither tensors nor numbers,
    strings or containers of them. Never runs code from the file, and imports nothing that it names.

    Raises UserError if it is no such file, or names what could be code.
    """
    try:
        names = _names_in(path)
        stood_in = {name for name in names if name.split(".")[0] in _STOOD_IN_FOR} | (names & _STOOD_IN_FOR_ALONE)
        refused = [name for name in names - stood_in - _KNOWN if not name.startswith("torch.")]
        if refused:
            raise _would_import(path, refused)
        stand_ins: list[Any] = [
            (_StandInDictionary if name.lower().endswith("dict") else _StandIn, name) for name in stood_in
        ]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what PyTorch thinks of old files
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: got a file that cannot be read ({reason}), expected a checkpoint") from error
    except Exception as error:  # bytes that mean nothing may raise anything
        unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and unknown:
            raise _would_import(path, [unknown[1]]) from error
        raise UserError(
            f"{path}: got a file that is damaged or no checkpoint, expected one that torch.save wrote"
        ) from error


def _would_import(path: Path, names: list[str]) -> UserError:
    listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return UserError(
        f"{path}: got a pickle that would import {listed}, which may be code, so it was not read; expected tensors: "
        "save the model's state_dict() alone, where the file comes from"
    )


def _names_in(path: Path) -> set[str]:
    """The classes and functions that a pickle names, found by reading and not by running it."""
    names: set[str] = set()
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(4):  # before PyTorch 1.6: pickles in a row, the fourth of which is the object
                names |= _names_in_pickle(file)
            return names
        with zipfile.ZipFile(file) as archive:
            files = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in files):
                raise UserError(
                    f"{path}: got a TorchScript program, expected weights: save the state_dict() of the module that "
                    "torch.jit.load gives"
                )
            for name in files:
                if name.endswith("/data.pkl"):
                    names |= _names_in_pickle(io.BytesIO(archive.read(name)))
    return names


def _names_in_pickle(file: Any) -> set[str]:
    """Those of the next pickle in `file`, by their names in Python 3. Any that this misses is refused in unpickling."""
    names: set[str] = set()
    texts = ["", ""]
    with contextlib.suppress(Exception):  # what is wrong with it, PyTorch says
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "GLOBAL":
                module, name = str(argument).split(" ", 1)
                module = "builtins" if module == "__builtin__" else module
                names.add("builtins.int" if (module, name) == ("builtins", "long") else f"{module}.{name}")
            elif operation.name == "STACK_GLOBAL":
                names.add(".".join(texts))
            elif isinstance(argument, str):
                texts = [texts[1], argument]
    # Bytes that are no pickle may look like imports, of what cannot be a name.
    return {name for name in names if all(part.isidentifier() for part in name.split("."))}
