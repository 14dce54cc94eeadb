"""Stopping between two steps: Ctrl-C, SIGTERM and SIGHUP ask, the loop finishes its step, saves, and says how to
resume.

A second Ctrl-C or SIGTERM stops at once. SIGHUP, which a terminal that closes may send twice, stays ignored where it
was, as under nohup. Where several processes work as one, torchrun ends all by SIGTERM when one has failed. No
Python code runs in a process that waits inside NCCL for one that is gone, so that a thread is told of the signal too,
and ends a process that does not answer.
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
SECONDS_TO_OUTLIVE = 300

_HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows
_ASK_TO_STOP = (
    (signal.SIGINT, signal.SIGTERM) if _HANGUP is None else (signal.SIGINT, signal.SIGTERM, _HANGUP)
)


def _heeded() -> list[signal.Signals]:
    """The signals that ask to stop: not SIGHUP where whoever started this process had it ignored."""
    ignored = _HANGUP is not None and signal.getsignal(_HANGUP) is signal.SIG_IGN
    return [number for number in _ASK_TO_STOP if not (ignored and number == _HANGUP)]


class StopRequest:
    """Whether a signal has asked to stop.

    Attributes:
        signal: number of the signal, 0 as long as none came.
    """

    signal = 0

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal, as shells have it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signal


@contextmanager
def deferred_interrupts() -> Iterator[StopRequest]:
    """Within the context the first signal is noted instead of raised; outside the main thread nothing changes."""
    request = StopRequest()
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = request.signal or number
        if number != _HANGUP:
            asked.append(number)
        if len(asked) > 1:
            raise Stopped(number)

    try:
        before = {number: signal.signal(number, note) for number in _heeded()}
    except ValueError:  # not the main thread: signals are not ours to handle
        yield request
        return
    try:
        with _answered(request) if distributed.count() > 1 else nullcontext():
            yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back_signals() -> Iterator[None]:
    """Within the context signals that ask to stop wait; a process begun in it has them wait until it outlives one.

    Outside the main thread, and where the system cannot, nothing changes.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    import multiprocessing
    from multiprocessing import resource_tracker

    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # or it is begun within the context, and lets signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASK_TO_STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_one_signal() -> None:
    """For a process that reads images: a signal to the whole group is for the one that it reads for, which ends it.

    SIGTERM ends it the second time, or minutes after the first: it is also how that one ends a reader that hangs.
    """

    def ignore(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if hasattr(signal, "alarm"):
            signal.alarm(SECONDS_TO_OUTLIVE)

    signal.signal(signal.SIGTERM, ignore)
    for number in _ASK_TO_STOP:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASK_TO_STOP)


class Stopped(KeyboardInterrupt):
    """A signal that asked to stop, where nothing is to be finished first.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def exit_code_of(asked: KeyboardInterrupt) -> int:
    """128 plus the number of the signal that was raised: 130 for Ctrl-C."""
    return asked.exit_code if isinstance(asked, Stopped) else 128 + signal.SIGINT


@contextmanager
def raised_signals() -> Iterator[None]:
    """Within the context SIGTERM and SIGHUP are raised as Ctrl-C is; outside the main thread nothing changes."""

    def end(number: int, frame: FrameType | None) -> None:
        if number == _HANGUP:
            signal.signal(number, signal.SIG_IGN)  # it comes twice, and what ends now is not to be disturbed
        raise Stopped(number)

    try:
        before = {n: signal.signal(n, end) for n in _heeded() if n != signal.SIGINT}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _answered(request: StopRequest) -> Iterator[None]:
    """Within the context this process ends if it gets SIGTERM or SIGHUP and cannot note it."""
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
    """Runs in a thread of its own; the system writes the number of every signal into ``pipe``."""
    with pipe:
        while number := pipe.recv(1):
            waited = 0.0
            while number[0] in (signal.SIGTERM, _HANGUP) and not request.signal:
                if waited >= SECONDS_TO_ANSWER:
                    os._exit(128 + number[0])
                time.sleep(SECONDS_BETWEEN_LOOKS)
                waited += SECONDS_BETWEEN_LOOKS
