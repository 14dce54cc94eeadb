"""How long work tells what it is doing, without knowing who listens.

Workflows and algorithms print nothing. They are handed a ``Progress`` and call it; the command line hands
them one that draws on stderr, a library user gets ``SILENT``.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work with a known number of steps."""

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        """Report that ``steps`` more are done, over ``images`` more images, with the latest figures.

        Where a run is resumed, the first call reports without images what was done before.
        """


class Progress(Protocol):
    """Where work in progress is told."""

    def task(self, title: str, total: int) -> AbstractContextManager[Task]:
        """A context that yields the ``Task`` to advance; ``title`` is what a person reads."""

    def note(self, text: str) -> None:
        """Say one line that stays on the screen."""


class _Silent:
    """Hears everything and says nothing."""

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        """Nothing."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """A task that nobody watches."""
        yield self

    def note(self, text: str) -> None:
        """Nothing."""


SILENT: Progress = _Silent()
