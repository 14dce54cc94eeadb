"""What a search keeps in its run directory, so that it can be stopped at any step and go on: a file a stage."""

import time
from collections.abc import Callable
from typing import Any

from saqcli import ranks
from saqcli.algorithms.random_state import random_state, set_random_state
from saqcli.io.interrupts import StopRequest
from saqcli.io.runs import RunDirectory, Stage
from saqcli.workflows.resuming import resuming, stop_if_asked


class SearchMemory:
    """Saves the state of a search now and then, and when a signal asks to stop.

    Args:
        run: whose directory it is.
        stop: tells whether a signal came.
        minutes: between two saves.
        note: told when the newest state is damaged.
        stage: of the search.
    """

    def __init__(
        self,
        run: RunDirectory,
        stop: StopRequest,
        minutes: float,
        note: Callable[[str], None] = lambda _: None,
        stage: Stage = "search",
    ) -> None:
        self.run, self.stop, self.minutes = run, stop, minutes
        self._file = run.search_states[stage]
        self._note, self._stage = note, stage
        self._saved_at = time.monotonic()
        self._random: dict[str, Any] | None = None

    def load(self) -> dict[str, Any] | None:
        """What was kept before.

        Raises:
            RunDirectoryError: damaged.
        """
        kept = ranks.from_first(lambda: self._file.load(self._note))
        if kept is None:
            return None
        if self._stage == "search" or not self.run.search_states["search"].exists():
            self._note(
                resuming(self.run, "the search" if self._stage == "search" else "the fit of the proxy")
            )
        randoms = kept["ranks"]
        self._random = randoms[ranks.index()] if len(randoms) == ranks.count() else None
        state: dict[str, Any] = kept["search"]
        return state

    def offer(self, state: Callable[[], dict[str, Any]], *, milestone: bool = False) -> None:
        """Keep ``state()`` if it is time, or at a ``milestone``.

        Raises:
            Interrupted: a signal asked to stop.
        """
        due = ranks.first() and time.monotonic() - self._saved_at > 60 * self.minutes
        if not ranks.any_of(due or milestone or bool(self.stop.signal)):
            return
        kept = {"search": state(), "ranks": ranks.gathered(random_state())}
        if ranks.first():
            self.run.save(self._file, kept)
        self._saved_at = time.monotonic()
        self.check()

    def check(self) -> None:
        """Stop if a signal asked for it.

        Raises:
            Interrupted: one did.
        """
        stop_if_asked(self.stop, self.run)

    def restore_random(self) -> None:
        """Put the random numbers back to where they were when the state was kept."""
        if self._random is not None:
            set_random_state(self._random)
