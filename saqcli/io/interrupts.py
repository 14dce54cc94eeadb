"""Stopping between two steps: Ctrl-C and SIGTERM ask, the loop finishes its step, saves, and says how to go
on.

A second Ctrl-C stops at once. Where several processes work as one, torchrun ends all by SIGTERM when one has failed. No
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

from saqcli import ranks

SECONDS_TO_ANSWER = 20.0  # torchrun kills after 30
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_OUTLIVE = 300

_ASK_TO_STOP = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal has asked to stop.

    Attributes:
        signal: number of the signal, 0 as long as none came.
    """

    signal = 0

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal


@contextmanager
def deferred_interrupts() -> Iterator[StopRequest]:
    """Within the context the first signal is noted instead of raised; outside the main thread nothing changes."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal:
            raise KeyboardInterrupt
        request.signal = number

    try:
        before = {number: signal.signal(number, note) for number in _ASK_TO_STOP}
    except ValueError:  # not the main thread: signals are not ours to handle
        yield request
        return
    try:
        with _answered(request) if ranks.count() > 1 else nullcontext():
            yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back_signals() -> Iterator[None]:
    """Within the context Ctrl-C and SIGTERM wait; a process begun in it has them wait until it outlives one.

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

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ignore)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASK_TO_STOP)


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing is to be finished first."""


@contextmanager
def raised_sigterm() -> Iterator[None]:
    """Within the context SIGTERM is raised as Ctrl-C is; outside the main thread nothing changes."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _answered(request: StopRequest) -> Iterator[None]:
    """Within the context this process ends if it gets SIGTERM and cannot note it."""
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
            while number[0] == signal.SIGTERM and not request.signal:
                if waited >= SECONDS_TO_ANSWER:
                    os._exit(128 + signal.SIGTERM)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                waited += SECONDS_BETWEEN_LOOKS
