"""Ranges of numeric options: part of the types of their fields, checked here, and shown by --help; and durations.

epochs: Count = 100
lr: Positive | Literal["auto"] = "auto"
momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
"""

import argparse
import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from fastsimclr.errors import UserError


@dataclass(frozen=True, repr=False)
class Range:
    """The finite numbers from low to high. above, below: without low, without high."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """Return whether the number is in the range; nan and the infinities are in none."""
        above = self.low < value if self.above else self.low <= value
        below = value < self.high if self.below else value <= self.high
        return above and below and -math.inf < value < math.inf

    def __repr__(self) -> str:
        if self.low == -math.inf:
            return "finite"
        low = f"above {self.low}" if self.above else f"at least {self.low}"
        if self.high == math.inf:
            return low
        if self.above == self.below:
            return f"between {self.low} and {self.high}" if self.above else f"from {self.low} to {self.high}"
        return f"{low}, {'below' if self.below else 'at most'} {self.high}"


Count = Annotated[int, Range(1)]
Index = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]
Fraction = Annotated[float, Range(0, 1, above=True)]
Finite = Annotated[float, Range()]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # NumPy's and scikit-learn's limits
Workers = Annotated[int, Range(0, 1024)]
Side = Annotated[int, Range(1, 16384)]  # of an image, in pixels
Channels = Annotated[int, Range(1, 16)]
_UNITS = (86400, 3600, 60, 1)  # seconds
_DURATION = re.compile(r"(?=.)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def check_fields(options: Any, prefix: str) -> None:
    """Raise UserError if a field of the dataclass `options`, or of a dataclass in it, does not have its type or range.

    prefix: of the field's name in the message, such as "--data.".
    """
    for name, hint in _hints(options.__class__).items():
        value = getattr(options, name)
        if is_dataclass(value):
            check_fields(value, f"{prefix}{name}.")
        elif not fits(value, hint):
            raise UserError(f"{prefix}{name}: got {value!r}, expected {describe(hint, value)}")


@cache
def _hints(options: Hashable) -> dict[str, Any]:
    """Return the types of the fields of the dataclass `options`, with their ranges."""
    hints = get_type_hints(options, include_extras=True)
    return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}


def fits(value: Any, hint: Any) -> bool:
    """Return whether `value` has the type `hint`, and each number its range. Any value fits a type that is not listed.

    A list passes for a tuple, and an integer for a float.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _is_number(value, arguments[0]) and value in arguments[1]
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        each = (arguments[0],) * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(each) and all(map(fits, value, each))
    return isinstance(value, hint) if hint in (str, bool, NoneType) else True


def describe(hint: Any, value: Any) -> str:
    """Return what is expected instead of `value`, which does not fit `hint`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, limits = arguments
        if kind is int and isinstance(value, Real) and not _is_number(value, int):
            return f"an integer, {limits}"
        return f"a number {limits}" if limits.above else str(limits)
    if origin in (Union, UnionType):
        return ", or ".join(describe(argument, value) for argument in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is tuple:
        number_of = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"{number_of}numbers, each {get_args(arguments[0])[1]}"
    return {str: "a string", NoneType: "none"}.get(hint, str(hint))


def number(hint: Any) -> Callable[[str], float]:
    """Return the `type` of an argparse option for a number of type `hint`."""
    kind, limits = get_args(hint)

    def parse(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {kind.__name__}, {limits}") from None
        if value not in limits:
            raise argparse.ArgumentTypeError(f"got {value}, expected {describe(hint, value)}")
        return value

    return parse


def parse_duration(text: str, option: str) -> float:
    """Return the seconds of a duration such as 4h, 1h30m or 90s. Raises UserError, which names the option."""
    match = _DURATION.fullmatch(text)
    seconds = 0 if match is None else sum(int(n or 0) * unit for n, unit in zip(match.groups(), _UNITS, strict=True))
    if not seconds:
        raise UserError(f"--{option}: got {text!r}, expected a duration such as 4h, 1h30m or 90s")
    return float(seconds)


def _is_number(value: Any, kind: type[float]) -> bool:
    return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
