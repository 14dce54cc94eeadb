"""Stopping between two steps: Ctrl-C and SIGTERM ask, the loop finishes its step, saves, and says how to go
on.

A second Ctrl-C stops at once.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are not ours to handle
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
