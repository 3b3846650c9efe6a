"""Stop signals: how a process ends when a terminal, a scheduler or the time limit stops it.

Python runs signal handlers in the main thread, and not while it waits in C: for other ranks, say. So a thread receives
the signals, too (signal.set_wakeup_fd), and ends the process if the main thread cannot. What a signal does:

    at first                         the main thread raises Stopped: there is nothing to save
    after `defer()`                  `received` is set; the work looks at it and ends itself, with a checkpoint
    then, within `interruptible()`   Stopped is raised after a second: waits for images, which may take long
    after `finish()`                 nothing more: the process is about to end
    SIGINT for the second time       the process ends at once

A process that has nothing to save and has not ended some seconds after the signal is made to end. With several ranks,
each of them tells the others through the store of the process group. If torchrun started them on several hosts, a
SIGTERM on one means that this host is preempted: the others end with an exit code after which torchrun restarts them.
"""

import atexit
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TIME_LIMIT = signal.SIGALRM
"""Stands for the time limit where a signal's number is expected. It is never sent."""

_INTERRUPT_S = 1.0
_GRACE_S = 4.0  # from the signal until a process with nothing to save is made to end
_SETUP_S = 60.0  # the same before a command begins, and until its ranks are connected, as the others wait for this one
_TELL_S = 4.0  # until all ranks have been told
_POLL_S, _TELL_EVERY_S = 0.25, 0.5
_SECOND_SIGINT_S = 0.5  # a launcher may forward the SIGINT that the terminal has sent to the process itself
_KEY, _COUNT = "fastsimclr/stop_signal", "fastsimclr/ranks_told"  # in the store


Result = TypeVar("Result")


class Stopped(BaseException):
    """A stop signal ends the work. Not an Exception, so that no `except Exception` of other code takes it for one."""


class StopSignal:
    """What this process knows about stop signals. Created by `stop_signals` and `run_process`."""

    def __init__(self, *, ends_process: bool = False) -> None:
        """ends_process: whether the process may be made to end. Otherwise it is a user's program or notebook."""
        self.received = 0
        """The number of the first signal received, by this rank or another, or TIME_LIMIT; 0 if there was none."""
        self.host = self._own_host = (
            int(os.environ.get("GROUP_RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0
        )
        """The host on which it was received, as torchrun counts them."""
        self.program, self.returns_zero = "fastsimclr", False
        """The name of the program, and whether its exit code is 0 after a signal, instead of 128 + its number."""
        self._ends_process = ends_process or _has_other_ranks()
        self._patience: float | None = _SETUP_S if self._ends_process else 0.0  # None: as long as it takes
        self._is_raised = self._is_insisted = False
        self._interruptible_since = float("inf")  # no such block
        self._final_exit_code: int | None = None  # once the work is done
        self._received_at = self._sigint_at = 0.0
        self._started, self._time_limit = time.monotonic(), float("inf")
        self._margin = self._longest = 0.0
        self._previous_handlers: dict[int, Any] = {}
        self._previous_wakeup = -1
        self._pipe = (-1, -1)
        self._thread = threading.Thread(target=self._watch, name="fastsimclr-signals", daemon=True)
        self._is_closed = False
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self._rank_thread: threading.Thread | None = None
        self._is_unshared, self._all_told = threading.Event(), threading.Event()
        self._all_told.set()  # no other rank is connected yet

    # What the work calls

    @property
    def is_ending(self) -> bool:
        """Whether a signal ends work that saves nothing."""
        return self.received != 0 and self._patience is not None and self._final_exit_code is None

    def defer(self, seconds: float | None = None) -> None:
        """Leave it to the work to look at `received` from now on. Stopped is only raised `seconds` after a signal."""
        self._patience = seconds

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise Stopped if the block takes longer than a second after a signal.

        Not at once: a batch that is about to come is better received, as its worker would report a broken connection.
        """
        self._interruptible_since = time.monotonic()
        try:
            yield
        finally:
            self._interruptible_since = float("inf")

    @property
    def success_code(self) -> int:
        """The exit code of a training that a signal has ended.

        Not 0 after SIGTERM on another host: torchrun does not restart ranks that have succeeded, so the other host
        would wait for this one in vain when it is back.
        """
        return 128 + self.received if self.received == signal.SIGTERM and self.host != self._own_host else 0

    @property
    def exit_code(self) -> int:
        """The exit code of the process. Not 0 before the ranks are connected, so that the launcher ends the others."""
        if self._final_exit_code is not None:
            return self._final_exit_code or self.success_code
        return self.success_code if self.returns_zero and self._patience != _SETUP_S else 128 + self.received

    def finish(self, exit_code: int) -> None:
        """Ignore signals from now on: the work is done. exit_code: of the process."""
        self._final_exit_code, self._received_at = exit_code, time.monotonic()

    def learn(self, number: int, host: int) -> None:
        """Note a signal that another rank has received on `host`."""
        if not self.received:
            self.host = host
        self._set_received(number)

    def set_time_limit(self, seconds: float) -> None:
        """Stop the work early enough for it to be over `seconds` after the start of the process."""
        self._time_limit, self._margin = seconds, min(seconds / 10, 60.0)
        self._wake_thread()

    def reserve(self, seconds: float) -> None:
        """Stop early enough for a step, or for saving a checkpoint, that takes this long."""
        self._longest = max(self._longest, seconds)

    def share(self, store: Any, world_size: int) -> None:
        """Exchange signals with the other ranks. store: a connection to the store of the process group, used here only.

        Raises Stopped if a signal was received while the ranks were being connected.
        """
        self._all_told.clear()
        self._rank_thread = threading.Thread(target=self._tell_ranks, args=(store, world_size), daemon=True)
        self._rank_thread.start()
        self._patience = 0.0
        if self.received:
            raise Stopped

    def run(self, work: Callable[[], Result]) -> Result:
        """Call `work` and return its result. Raises Stopped if a signal has come before, or if it fails after one.

        Its error may be a consequence of the signal, such as a connection that another rank has closed.
        """
        self._patience = _SETUP_S if _has_other_ranks() else 0.0
        if self.received and not self._patience:
            raise Stopped
        try:
            return work()
        except BaseException as error:
            if self.is_ending and not isinstance(error, Stopped):
                raise Stopped from error
            raise

    def stop_sharing(self) -> None:
        """Stop exchanging signals with the other ranks, once all know of one that ends the work.

        They would otherwise take the end of this rank for a failure.
        """
        if self.is_ending:
            self._all_told.wait(_TELL_S)
        self._is_unshared.set()
        if self._rank_thread is not None:
            self._rank_thread.join(_TELL_S)

    def describe(self) -> str:
        """Return the line to print about work that has saved nothing."""
        return f"{self.program}: stopped by {describe(self.received)}; run the same command to start again"

    # Receiving signals

    def install(self) -> None:
        """Handle the signals. Must be called in the main thread. Under nohup, SIGHUP stays ignored."""
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._handle)
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread.start()

    def close(self) -> None:
        """Restore the previous handlers."""
        self.stop_sharing()
        self._is_closed = True
        self._wake_thread()
        self._thread.join()
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        for end in self._pipe:
            os.close(end)

    def _handle(self, number: int, _: object) -> None:
        """The handler, in the main thread: of a signal, or of `_interrupt_main_thread`."""
        self._set_received(number)
        if self._is_insisted:
            raise KeyboardInterrupt
        if self._is_block_due():
            self._interruptible_since = float("inf")
            raise Stopped
        if self._is_due() and not self._is_raised:
            self._is_raised = True
            raise Stopped

    def _watch(self) -> None:
        """The thread that receives signals as well, and ends the process where the main thread does not."""
        while not self._is_closed:
            is_idle = not self.received and self._time_limit == float("inf")
            select.select([self._pipe[0]], [], [], None if is_idle else _POLL_S)
            with suppress(BlockingIOError):
                for number in os.read(self._pipe[0], 64):
                    if number in self._previous_handlers:
                        self._receive(number)
            self._check_time()

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        self._set_received(number)
        if number == signal.SIGHUP:
            self._leave_terminal()
        elif number == signal.SIGINT and not self._sigint_at:
            self._sigint_at = now
        elif number == signal.SIGINT and now - self._sigint_at > _SECOND_SIGINT_S:
            if self._ends_process:
                os._exit(128 + number)
            self._is_insisted = True
            self._interrupt_main_thread()

    def _set_received(self, number: int) -> None:
        if not self.received:
            self._received_at = time.monotonic()
            self.received = number

    def _is_due(self, extra: float = 0.0) -> bool:
        """Whether the patience with work that saves nothing, and `extra` seconds, have passed since the signal."""
        patience = self._patience if self._final_exit_code is None else None
        return patience is not None and time.monotonic() >= self._received_at + patience + extra

    def _is_block_due(self) -> bool:
        """Whether to interrupt the block of `interruptible`."""
        return time.monotonic() >= max(self._received_at, self._interruptible_since) + _INTERRUPT_S

    def _check_time(self) -> None:
        now = time.monotonic()
        if not self.received and now >= self._started + self._time_limit - self._margin - 2 * self._longest:
            self._stop_from_thread(TIME_LIMIT, self._own_host)
        if not self.received:
            return
        if self._is_block_due() or (self._patience and self._is_due() and not self._is_raised):
            self._interrupt_main_thread()
        if self._ends_process and self._final_exit_code is not None and now >= self._received_at + _GRACE_S:
            os._exit(self.exit_code)
        if self._ends_process and self._is_due(_GRACE_S):
            self._all_told.wait(_TELL_S)
            if os.environ.get("RANK", "0") == "0":
                os.write(2, f"{self.describe()}\n".encode())
            os._exit(self.exit_code)

    def _stop_from_thread(self, number: int, host: int) -> None:
        self.learn(number, host)
        self._interrupt_main_thread()

    def _interrupt_main_thread(self) -> None:
        """Have the main thread call `_handle`, even if it waits in a system call."""
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, signal.SIGUSR1)

    def _wake_thread(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._pipe[1], b"\0")

    def _leave_terminal(self) -> None:
        """Discard what is written to the terminal that has hung up: writing would fail."""
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in self._terminals:
            os.dup2(null, stream)
        os.close(null)

    def _tell_ranks(self, store: Any, world_size: int) -> None:
        """Tell the other ranks of a signal, and be told, until all know or the rank with the store has ended."""
        is_told = False
        with suppress(RuntimeError):
            while not self._is_unshared.wait(_TELL_EVERY_S):
                if not self.received and store.check([_KEY]):
                    self._stop_from_thread(*json.loads(store.get(_KEY)))
                if self.received and not is_told:
                    store.set(_KEY, json.dumps([int(self.received), self.host]))
                    store.add(_COUNT, 1)
                    is_told = True
                if is_told and store.add(_COUNT, 0) == world_size:
                    break
        self._all_told.set()


_active: StopSignal | None = None  # signals are the process's


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Handle stop signals within the block, and yield what is known of them.

    Within another such block, and in a process of `run_process`, that is what the outer one yields. Signals are not
    handled outside the main thread, where Python cannot.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or StopSignal()
        return
    _active = StopSignal()
    try:
        _active.install()
        yield _active
    finally:
        _active.close()
        _active = None


def run_process(main: Callable[[], int]) -> NoReturn:
    """Handle stop signals from now to the end of the process, and end it with the exit code that `main` returns."""
    global _active
    _active = StopSignal(ends_process=True)
    _active.install()
    try:
        code = main()
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # prints the traceback
        code = 1
    _end_process(code)


def _end_process(exit_code: int) -> NoReturn:
    """End the process as sys.exit does, but without taking the interpreter and its modules apart.

    With PyTorch that takes up to a second of CPU time, and daemon threads that are in a library written in C++ abort
    the process.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the other threads, as multiprocessing does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # no reader, or closed
            stream.flush()
    os._exit(exit_code)


def active() -> StopSignal:
    """Return what `stop_signals` has yielded; outside of its block, what is known of signals that nobody handles."""
    return _active or StopSignal()


def describe(number: int) -> str:
    """Return the name of a stop signal, or of the time limit."""
    return "the time limit" if number == TIME_LIMIT else signal.Signals(number).name


def _has_other_ranks() -> bool:
    """Whether torchrun or srun has started several processes for this run."""
    return any(os.environ.get(name, "1") not in ("", "1") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
