"""The format of a checkpoint: a file of torch.save that ends with a checksum, and the types of its contents.

torch.save writes a zip archive, in which each tensor has a CRC-32; PyTorch does not check it. So the comment of the
archive, which ends the file, holds the CRC-32 of all bytes before. It is found to be wrong, or absent, in a file that
is damaged anywhere or cut off. At 3.5 GB/s, CRC-32 is the fastest checksum of Python's standard library.
"""

import math
import os
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastsimclr.errors import UserError

FORMAT = 3
_COMMENT = b"fastsimclr %08x"
_COMMENT_BYTES = 19
_LENGTH_BYTES = 2  # of the comment's length, which ends an archive without a comment
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Kind:
    """A kind of value: what an error says is expected, and whether a value is of this kind."""

    expected: str
    holds: Callable[[Any], bool]
    is_required: bool = True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_dict(value: Any, of_values: Callable[[Any], bool], key: type = str) -> bool:
    return isinstance(value, dict) and all(isinstance(k, key) and of_values(v) for k, v in value.items())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _is_bad_image(value: Any) -> bool:
    return isinstance(value, list | tuple) and [*map(type, value)] == [int, str, str] and value[0] >= 0


def _is_callback(value: Any) -> bool:
    return isinstance(value, list | tuple) and [*map(type, value)] == [str, dict]


def _is_yaml(value: Any) -> bool:
    import yaml  # here: `import fastsimclr` needs only PyTorch and torchvision

    try:
        return isinstance(value, str) and isinstance(yaml.safe_load(value), dict)
    except yaml.YAMLError:
        return False


def _is_probe(value: Any) -> bool:
    """Whether it is the state of an `OnlineProbe`: a weight (C, F), a bias (C,), and what Adam keeps of each."""
    if not (isinstance(value, dict) and value.keys() == {"weight", "bias", "optimizer"}):
        return False
    parameters = value["weight"], value["bias"]
    return (
        all(map(_is_tensor, parameters))
        and (parameters[0].ndim, parameters[1].shape) == (2, parameters[0].shape[:1])
        and _is_dict(value["optimizer"], lambda of: _is_dict(of, _is_tensor), int)
        and all(
            number in (0, 1)
            and of.keys() == {"step", "exp_avg", "exp_avg_sq"}
            and of["step"].ndim == 0
            and of["exp_avg"].shape == of["exp_avg_sq"].shape == parameters[number].shape
            for number, of in value["optimizer"].items()
        )
    )


COUNT = Kind("an integer of at least 0", _is_at_least(0))
POSITIVE = Kind("an integer of at least 1", _is_at_least(1))
INTEGER = Kind("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))
RECORD = {"step": COUNT, "epoch": COUNT, "loss": Kind("a number", lambda value: isinstance(value, float))}

CONTENTS: dict[str, Any] = {
    "format": Kind(f"{FORMAT}, the format of this version of fastsimclr", lambda value: value == FORMAT),
    "step": COUNT,
    "batch_size": POSITIVE,
    "architecture": {
        "encoder": {
            "name": TEXT,
            "width": Kind("a number above 0", lambda value: _is_number(value) and value > 0),
            "stem": TEXT,
            "image_size": POSITIVE,
            "channels": POSITIVE,
        },
        "hidden": Kind("none or an integer of at least 1", lambda value: value is None or POSITIVE.holds(value)),
        "out": POSITIVE,
        "layers": COUNT,
        "optimizer": TEXT,
        "image_size": Kind("an integer of at least 1", _is_at_least(1), is_required=False),  # if weights depend on it
    },
    "model": Kind("tensors by name", lambda value: _is_dict(value, _is_tensor) and len(value) > 0),
    "optimizer": {
        "state": Kind(
            "a dict of tensors and numbers for each parameter",
            lambda value: _is_dict(value, lambda of: _is_dict(of, lambda x: _is_tensor(x) or _is_number(x)), int),
        ),
        "param_groups": Kind(
            "a list of groups, each with its parameters",
            lambda value: (
                isinstance(value, list)
                and all(_is_dict(group, lambda _: True) and isinstance(group.get("params"), list) for group in value)
            ),
        ),
    },
    "grad_scaler": Kind(
        "a positive scale and its numbers, or nothing",
        lambda value: value == {} or (_is_dict(value, _is_number) and value.get("scale", 0) > 0),
    ),
    "data": {"images": POSITIVE, "seed": INTEGER, "epoch": COUNT, "position": COUNT},
    "skipped_images": {
        "seen": COUNT,
        "bad": Kind(
            "a list of (index, key, reason)", lambda value: isinstance(value, list) and all(map(_is_bad_image, value))
        ),
    },
    "skipped_steps": {"total": COUNT, "in_a_row": COUNT},
    "callbacks": Kind(
        "a list of (class name, state)", lambda value: isinstance(value, list) and all(map(_is_callback, value))
    ),
    "probe": Kind("the state of a linear probe, or nothing", lambda value: value == {} or _is_probe(value)),
    "untrained_knn": Kind("none or a fraction", lambda value: value is None or (_is_number(value) and 0 <= value <= 1)),
    "unfinished_epoch": Kind(
        "none or the record of a step",
        lambda value: (
            value is None
            or (isinstance(value, dict) and all(name in value and of.holds(value[name]) for name, of in RECORD.items()))
        ),
    ),
    "config": Kind("the YAML of a configuration", _is_yaml),
    "options": Kind("options by name", lambda value: _is_dict(value, lambda _: True)),
}
"""What a checkpoint holds: each key with the kind of its value, or with the keys within it."""


class Checkpoint(NamedTuple):
    """A good checkpoint. Its contents are those that were checked, even if another process replaces the file."""

    path: Path
    state: dict[str, Any]
    """A state of CONTENTS, with its tensors in the memory-mapped file."""

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Check a file, and open it. Raises UserError as `load_checkpoint` does."""
        return cls(path, load_checkpoint(path, mmap=True))


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a state of CONTENTS, with its tensors on the CPU, to a new file. Raises OSError if that fails."""
    with open(path, "wb") as file:
        output = _Checksummed(file)
        try:
            torch.save(state, output)  # type: ignore[arg-type]
        except RuntimeError as error:  # PyTorch's own, which has no reason
            raise output.error or error from None
        file.seek(-_LENGTH_BYTES, os.SEEK_END)
        file.write(_COMMENT_BYTES.to_bytes(_LENGTH_BYTES, "little") + _COMMENT % output.checksum)


def load_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Load a state of CONTENTS on the CPU, after checking the file. Never runs code from it.

    mmap: leave the tensors in the file, until they are used.
    Raises UserError if the file is missing, damaged, incomplete or not a checkpoint of fastsimclr.
    """
    try:
        check_bytes(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise UserError(f"{path}: got no such file, expected a checkpoint (RUN/checkpoints/last.pt)") from error
    except OSError as error:
        raise UserError(f"{path}: got a file that cannot be read ({error.strerror}), expected a checkpoint") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: got a file of other contents, expected a checkpoint of a fastsimclr run") from error
    if (problem := find_problem(state)) is not None:
        raise UserError(f"{path}: {problem}: this is no checkpoint that this version of fastsimclr can use")
    return state


def check_bytes(path: Path) -> None:
    """Read the file and compare its checksum. Raises UserError if it is another or there is none, and OSError."""
    with open(path, "rb", buffering=0) as file:
        archive_bytes = os.fstat(file.fileno()).st_size - _COMMENT_BYTES - _LENGTH_BYTES
        checksum = _checksum(file, archive_bytes)
        end = file.read(_COMMENT_BYTES + _LENGTH_BYTES)
    # The checksum is that of the archive with an empty comment.
    checksum = zlib.crc32(bytes(_LENGTH_BYTES), checksum)
    length, comment = end[:_LENGTH_BYTES], end[_LENGTH_BYTES:]
    if length != _COMMENT_BYTES.to_bytes(_LENGTH_BYTES, "little") or comment[:-8] != _COMMENT[:-4]:
        raise UserError(
            f"{path}: got a file without the checksum at its end, expected a checkpoint of fastsimclr: it is "
            "incomplete, damaged or another kind of file"
        )
    if comment != _COMMENT % checksum:
        raise UserError(
            f"{path}: got a damaged file (checksum {checksum:08x}), expected {comment[-8:].decode('ascii', 'replace')}"
        )


def find_problem(value: Any, kind: Kind | dict[str, Any] = CONTENTS, key: str = "contents") -> str | None:
    """Return the first thing that is wrong with the contents, as "KEY: got ..., expected ..."; None if nothing is."""
    if isinstance(kind, Kind):
        return None if kind.holds(value) else f"{key}: got {_shown(value)}, expected {kind.expected}"
    if not isinstance(value, dict):
        return f"{key}: got {_shown(value)}, expected a dict"
    for name, of in kind.items():
        if name in value:
            problem = find_problem(value[name], of, name if kind is CONTENTS else f"{key}.{name}")
            if problem is not None:
                return problem
        elif isinstance(of, dict) or of.is_required:
            return f"{key}: got no {name}, expected one"
    unknown = [str(name) for name in value if name not in kind]
    return f"{key}: got the unknown key {unknown[0]!r}, expected none" if unknown else None


def has_checksum(path: Path) -> bool:
    """Return whether the file ends like a checkpoint of fastsimclr."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _COMMENT_BYTES))
        return file.read().startswith(_COMMENT[:-4])


def is_checkpoint(contents: Any) -> bool:
    """Return whether torch.load has loaded these contents from a checkpoint, perhaps of another version or damaged."""
    return isinstance(contents, dict) and contents.keys() >= {"format", "architecture", "model", "optimizer", "data"}


class _Checksummed:
    """A file to write to that computes the checksum of what is written, and keeps the error of the operating system."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.checksum = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _checksum(file: Any, size: int) -> int:
    """Return the CRC-32 of the next `size` bytes, as far as there are any."""
    checksum, block = 0, memoryview(bytearray(_BLOCK_BYTES))
    while size > 0 and (count := file.readinto(block[: min(size, _BLOCK_BYTES)])):
        checksum = zlib.crc32(block[:count], checksum)
        size -= count
    return checksum


def _shown(value: Any) -> str:
    """Return a value for an error in one line."""
    text = "a dict" if isinstance(value, dict) else "a tensor" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"
