"""Periodic saving of training and search state, and saving on signals."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

from saqcli import distributed
from saqcli.random_state import random_state, set_random_state
from saqcli.runs.directory import RunDirectory, Stage, stop_if_asked, stopped
from saqcli.runs.interrupts import deferred_interrupts
from saqcli.runs.resume import resuming


class PeriodicSaving(ABC):
    """Saves every few minutes, at milestones, and when a signal asks to stop.

    Within its context a signal is deferred until the end of the step, where all ranks raise ``Interrupted``.

    Args:
        run: the run directory.
        minutes: time between two saves.
    """

    def __init__(self, run: RunDirectory, minutes: float) -> None:
        self.run, self.minutes = run, minutes

    def __enter__(self) -> Self:
        """Defer signals."""
        self._context = ExitStack()
        self.stop = self._context.enter_context(deferred_interrupts())
        self._saved_at = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Handle a signal that arrived after the last offer."""
        with self._context:
            if kind is None:
                self.check()

    def offer(
        self, state: Callable[[], dict[str, Any]], *, milestone: bool = False, failing: bool = False
    ) -> None:
        """Save ``state()`` if it is due or at a ``milestone``, unless steps are ``failing``; always after a signal.

        The first rank decides whether a save is due. All ranks call this together.

        Raises:
            Interrupted: a signal asked to stop.
        """
        due = distributed.first() and time.monotonic() - self._saved_at > 60 * self.minutes
        if not distributed.any_of(((due or milestone) and not failing) or bool(self.stop.signal)):
            return
        self._save(state())
        self._saved_at = time.monotonic()
        self.check()

    def check(self) -> None:
        """Stop on all ranks if one of them received a signal. All ranks call this together.

        Raises:
            Interrupted: a signal asked to stop.
        """
        stop_if_asked(self.stop, self.run)

    @abstractmethod
    def _save(self, state: dict[str, Any]) -> None:
        """Write ``state``; called by all ranks."""


class TrainingSaving(PeriodicSaving):
    """Saves training state to the run's checkpoint and metrics to its metrics file.

    Args:
        run: the run directory.
        minutes: time between two saves.
        kept: further entries of the checkpoint.
    """

    def __init__(self, run: RunDirectory, minutes: float, kept: dict[str, Any]) -> None:
        super().__init__(run, minutes)
        self._kept = kept

    def _save(self, state: dict[str, Any]) -> None:
        self.run.save_checkpoint({**self._kept, **state})

    def log(self, **values: Any) -> None:
        """Append a line to the metrics of the run."""
        self.run.log(**values)

    def check_signal(self) -> None:
        """Stop this rank alone, without saving, if it received a signal.

        Raises:
            Interrupted: a signal asked to stop.
        """
        if self.stop.signal:
            raise stopped(self.run, self.stop.exit_code)


_WORK: dict[Stage, str] = {
    "proxy": "the fit of the proxy",
    "search": "the search",
    "accuracy": "the measurements of accuracy",
    "reconstruction": "the reconstruction",
}


class SearchMemory(PeriodicSaving):
    """The memory of a search or a reconstruction: one file for each stage.

    Args:
        run: the run directory.
        minutes: time between two saves.
        note: receives a line when it resumes, or if the newest state is damaged.
        stage: stage of the search.
    """

    def __init__(
        self,
        run: RunDirectory,
        minutes: float,
        note: Callable[[str], None] = lambda _: None,
        stage: Stage = "search",
    ) -> None:
        super().__init__(run, minutes)
        self._file = run.search_states[stage]
        self._note, self._stage = note, stage
        self._random: dict[str, Any] | None = None

    def load(self) -> dict[str, Any] | None:
        """The last saved state, or None.

        Raises:
            RunDirectoryError: the file is damaged.
        """
        kept = distributed.from_first(lambda: self._file.load(self._note))
        if kept is None:
            return None
        if self._stage != "proxy" or not self.run.search_states["search"].exists():
            self._note(resuming(self.run, _WORK[self._stage]))
        randoms = kept["ranks"]
        self._random = randoms[distributed.index()] if len(randoms) == distributed.count() else None
        state: dict[str, Any] = kept["search"]
        return state

    def _save(self, state: dict[str, Any]) -> None:
        kept = {"search": state, "ranks": distributed.gathered(random_state())}
        if distributed.first():
            self.run.save(self._file, kept)

    def restore_random(self) -> None:
        """Restore the random state of the saved state, unless the number of ranks has changed."""
        if self._random is not None:
            set_random_state(self._random)
