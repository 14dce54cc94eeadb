"""Interruption by Ctrl-C, SIGTERM and SIGHUP: finish the step, save, stop.

A second Ctrl-C or SIGTERM stops immediately. SIGHUP may arrive twice from a closing terminal, and stays ignored if it
was ignored at start, as under nohup. When one rank fails, torchrun sends SIGTERM to all others. A process that waits
inside NCCL for a missing rank runs no Python code, so a thread watches for signals too, and ends a process that does
not respond.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

from saqcli import distributed

SECONDS_TO_ANSWER = 20.0  # torchrun kills after 30
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_OUTLIVE = 300  # of a worker after the first SIGTERM

_HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows
_STOP_SIGNALS = (
    (signal.SIGINT, signal.SIGTERM) if _HANGUP is None else (signal.SIGINT, signal.SIGTERM, _HANGUP)
)


def _handled_signals() -> list[signal.Signals]:
    """The signals that stop this process; without SIGHUP if it was ignored at start."""
    ignored = _HANGUP is not None and signal.getsignal(_HANGUP) is signal.SIG_IGN
    return [number for number in _STOP_SIGNALS if not (ignored and number == _HANGUP)]


class StopRequest:
    """The first signal that was received.

    Attributes:
        signal: number of the signal; 0 before any.
    """

    signal = 0

    @property
    def exit_code(self) -> int:
        """128 plus the signal number, as in shells: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signal


@contextmanager
def deferred_interrupts() -> Iterator[StopRequest]:
    """Within the context the first signal is recorded instead of raised; no effect outside the main thread."""
    request = StopRequest()
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = request.signal or number
        if number != _HANGUP:
            received.append(number)
        if len(received) > 1:
            raise Stopped(number)

    try:
        before = {number: signal.signal(number, note) for number in _handled_signals()}
    except ValueError:  # not the main thread
        yield request
        return
    try:
        with _watchdog(request) if distributed.count() > 1 else nullcontext():
            yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Within the context stop signals are blocked, also in processes started in it until ``outlive_one_signal``.

    No effect outside the main thread, and on systems without ``pthread_sigmask``.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    import multiprocessing
    from multiprocessing import resource_tracker

    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # started within the context, it would unblock signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_one_signal() -> None:
    """Let a loader worker ignore signals to the process group, which its parent handles before it ends the worker.

    A second SIGTERM ends the worker, or the first after some minutes: the parent also ends hanging workers by SIGTERM.
    """

    def ignore(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if hasattr(signal, "alarm"):
            signal.alarm(SECONDS_TO_OUTLIVE)

    signal.signal(signal.SIGTERM, ignore)
    for number in _STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


class Stopped(KeyboardInterrupt):
    """A signal that stops immediately.

    Args:
        number: signal number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    """128 plus the number of the signal that was raised: 130 for Ctrl-C."""
    return interrupt.exit_code if isinstance(interrupt, Stopped) else 128 + signal.SIGINT


@contextmanager
def raised_signals() -> Iterator[None]:
    """Within the context SIGTERM and SIGHUP raise like Ctrl-C; no effect outside the main thread."""

    def end(number: int, frame: FrameType | None) -> None:
        if number == _HANGUP:
            signal.signal(number, signal.SIG_IGN)  # it may arrive twice, during the clean-up
        raise Stopped(number)

    try:
        before = {n: signal.signal(n, end) for n in _handled_signals() if n != signal.SIGINT}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watchdog(request: StopRequest) -> Iterator[None]:
    """Within the context this process ends if it receives SIGTERM or SIGHUP and cannot record it."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(ours, request), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()


def _watch(pipe: socket.socket, request: StopRequest) -> None:
    """Thread of the watchdog; the system writes the number of every signal into ``pipe``."""
    with pipe:
        while number := pipe.recv(1):
            waited = 0.0
            while number[0] in (signal.SIGTERM, _HANGUP) and not request.signal:
                if waited >= SECONDS_TO_ANSWER:
                    os._exit(128 + number[0])
                time.sleep(SECONDS_BETWEEN_LOOKS)
                waited += SECONDS_BETWEEN_LOOKS
