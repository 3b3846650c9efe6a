"""Durations of options; test_config.py tests the ranges."""

import pytest

from fastsimclr.errors import UserError
from fastsimclr.ranges import parse_duration


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1h30m", 5400), ("4h", 14400), ("2d", 172800)])
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text, "time_limit") == seconds


@pytest.mark.parametrize("text", ["", "4", "0s", "4 h", "-1h", "30m1h", "4:00:00"])
def test_invalid_durations(text: str) -> None:
    with pytest.raises(UserError, match=r"--time_limit: got .*, expected a duration such as 4h, 1h30m or 90s"):
        parse_duration(text, "time_limit")
