"""Numbers for people."""

import math


def number(value: float, digits: int = 4) -> str:
    """Four digits that matter: 0.4237, 1,434, 5e-5."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def percent(fraction: float | None) -> str:
    return f"{100 * fraction:.1f} %" if fraction is not None and math.isfinite(fraction) else "–"


def count(many: int, one: str, several: str | None = None) -> str:
    """1 image, 1,433 images."""
    return f"{many:,} {one if many == 1 else several or one + 's'}"
