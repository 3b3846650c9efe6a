"""What a stop signal does in this process; tests/faults/test_signals.py sends signals to whole runs."""

import signal
import time

import pytest

from fastsimclr.stopping import STOP_SIGNALS, TIME_LIMIT, Stopped, stop_signals


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


@pytest.mark.parametrize(
    ("number", "host", "code"),
    [(signal.SIGTERM, 0, 143), (signal.SIGTERM, 1, 0), (signal.SIGINT, 0, 0), (TIME_LIMIT, 0, 0)],
)
def test_sigterm_on_another_host_is_no_success(
    number: int, host: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun has set the variables. It does not restart ranks that have succeeded."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("GROUP_RANK", "1")
    with stop_signals() as stop:
        stop.defer()
        stop.learn(number, host)
        stop.learn(signal.SIGTERM, 0)  # only the first counts
        stop.finish(0)
        assert stop.exit_code == code
