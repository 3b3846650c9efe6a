"""What a stop signal does in this process; tests/faults/test_signals.py sends signals to whole runs."""

import signal
import time

import pytest

from fastsimclr.errors import UserError
from fastsimclr.stopping import STOP_SIGNALS, TIME_LIMIT, Stopped, parse_duration, stop_signals


def wait() -> None:
    time.sleep(20)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_raises_where_nothing_is_saved(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped), stop_signals() as stop:  # noqa: PT012
        signal.raise_signal(number)
        wait()
    assert stop.received == number
    assert signal.getsignal(number) == before


def test_deferred_work_looks_at_the_signal_itself() -> None:
    with stop_signals() as stop:
        stop.defer()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGUSR1, "the first"
        with pytest.raises(Stopped), stop.interruptible():
            wait()
        stop.finish(0)
        signal.raise_signal(signal.SIGTERM)


def test_the_time_for_deferred_work_is_limited() -> None:
    with stop_signals() as stop:
        stop.defer(0.2)
        signal.raise_signal(signal.SIGHUP)
        started = time.monotonic()
        with pytest.raises(Stopped):
            wait()
        assert 0.2 <= time.monotonic() - started < 5


def test_a_second_sigint_ends_a_program_that_finishes_a_step() -> None:
    with stop_signals() as stop:
        stop.defer()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # forwarded by a launcher
        time.sleep(0.6)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            wait()


def test_the_time_limit_leaves_time_for_the_end() -> None:
    started = time.monotonic()
    with stop_signals() as stop:
        stop.defer()
        stop.reserve(1.0)  # s per step
        stop.set_time_limit(4.0)
        with pytest.raises(Stopped), stop.interruptible():
            wait()
        assert stop.received == TIME_LIMIT
    assert 1.5 <= time.monotonic() - started < 4


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1h30m", 5400), ("4h", 14400), ("2d", 172800)])
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text, "time_limit") == seconds


@pytest.mark.parametrize("text", ["", "4", "0s", "4 h", "-1h", "30m1h", "4:00:00"])
def test_invalid_durations(text: str) -> None:
    with pytest.raises(UserError, match=r"--time_limit: got .*, expected a duration such as 4h, 1h30m or 90s"):
        parse_duration(text, "time_limit")
