"""Progress reports of long-running work, independent of their display.

Pipelines and algorithms print nothing. They receive a ``Progress`` and call it; the command line passes one that draws
on stderr, and library users get ``SILENT`` by default.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """A piece of work with a known number of steps."""

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        """Report that ``steps`` more are done, over ``images`` more images, with the latest figures.

        When a run is resumed, the first call reports the earlier steps, without images.
        """


class Progress(Protocol):
    """Receives progress reports."""

    def task(self, title: str, total: int) -> AbstractContextManager[Task]:
        """A context that yields the ``Task`` to advance; ``title`` is shown to the user."""

    def note(self, text: str) -> None:
        """Report one line that stays on the screen."""


class _Silent:
    """Ignores all reports."""

    def __repr__(self) -> str:
        return "SILENT"

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        """Does nothing."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """A task that ignores all reports."""
        yield self

    def note(self, text: str) -> None:
        """Does nothing."""


SILENT: Progress = _Silent()
