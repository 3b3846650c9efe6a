"""Numbers for people."""

import itertools
import math


def number(value: float, digits: int = 4) -> str:
    """Four digits that matter: 0.4237, 1,434, 5e-5."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return _plain_exponent(f"{value:.{digits}g}")


def percent(fraction: float, decimals: int = 1) -> str:
    return f"{100 * fraction:.{decimals}f} %" if math.isfinite(fraction) else "–"


def count(many: int, one: str, several: str | None = None) -> str:
    """1 image, 1,433 images."""
    return f"{many:,} {one if many == 1 else several or one + 's'}"


def duration(seconds: float) -> str:
    """In the two largest units: 1 min 43 s."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for (name, size), (below, small) in itertools.pairwise(units):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, at most about `most` of them."""
    raw = max(high - low, 1e-300) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def tick_labels(values: list[float]) -> list[str]:
    """As many decimals as their distance asks for, the same for all; thousands as k, millions as M."""
    largest = max(map(abs, values), default=0.0)
    if 0 < largest < 1e-3:
        return [_plain_exponent(f"{value:.3g}") for value in values]
    scale, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    step = (values[1] - values[0] if len(values) > 1 else largest or 1.0) / scale
    decimals = next(d for d in range(12) if abs(round(step, d) - step) < 1e-6 * step or d == 11)
    return ["0" if value == 0 else f"{value / scale:,.{decimals}f}{suffix}" for value in values]


def _plain_exponent(text: str) -> str:
    return text.replace("e-0", "e-").replace("e+0", "e")
