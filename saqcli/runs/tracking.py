"""The trackers of a run: started, fed with the lines of ``metrics.jsonl``, and ended with its status.

``trackers.json`` in the run directory holds the identifier of every tracked run, and the number of lines that it was
given. A resumed run continues in the same tracked run: lines that it has are not logged a second time, and lines that
it missed are. A tracker that replaces what it recorded gets all lines again.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from saqcli.config import RunConfig
from saqcli.errors import ConfigError, Problems, RunDirectoryError, first_line
from saqcli.random_state import random_state, set_random_state
from saqcli.runs.trackers import TRACKERS, End, Start, Status, Tracker
from saqcli.runs.trackers.base import plain
from saqcli.serialization import parse_json, read_text, write_text

FILE = "trackers.json"
ARTIFACTS = ("policy.json", "report.md", "artifacts/*")  # of a finished run


class TrackedRun(BaseModel):
    """A run of a tracker.

    Attributes:
        id: by which the tracker knows it.
        lines: number of lines of ``metrics.jsonl`` that it was given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(min_length=1, max_length=500)]
    lines: Annotated[int, Field(ge=0)] = 0


class TrackedRuns(BaseModel):
    """The content of ``trackers.json``.

    Attributes:
        runs: by the name of the tracker.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    runs: dict[str, TrackedRun] = {}


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist and are installed; none is imported.

    Raises:
        ConfigError: all problems in one message: unknown, given twice, or not installed.
    """
    problems = Problems()
    for name in dict.fromkeys(names):
        tracker = problems.attempt(TRACKERS.find, name, "run.track")
        if names.count(name) > 1:
            problems.add(ConfigError(f"`run.track={name}` is given twice: give it once"))
        if tracker is not None and importlib.util.find_spec(tracker.package) is None:
            problems.add(
                ConfigError(
                    f"`run.track={name}` needs the package {tracker.package}, which is not installed: "
                    f'pip install "{tracker.install}", or remove `run.track`'
                )
            )
    problems.check()


class Tracking:
    """The trackers of a run, in the process that writes the run directory.

    Args:
        folder: the run directory.
        note: receives a line when a tracker fails, and is dropped.
    """

    def __init__(self, folder: Path, note: Callable[[str], None] = lambda _: None) -> None:
        self._folder, self._note = folder.absolute(), note
        self._trackers: dict[str, Tracker] = {}
        self._known = TrackedRuns()
        self._lines = 0  # of metrics.jsonl
        self._epoch = 0  # of the last line

    def start(self, config: RunConfig, verb: str, metrics: str) -> None:
        """Start the trackers of ``config``, or continue those that the run directory knows.

        Args:
            config: resolved.
            verb: the command of saq.
            metrics: the content of ``metrics.jsonl``.

        Raises:
            ConfigError: a tracker that this run does not have yet cannot be started.
            RunDirectoryError: ``trackers.json`` is damaged.
        """
        if not config.run.track:
            return
        path = self._folder / FILE
        if path.is_file():
            self._known = parse_json(TrackedRuns, read_text(path, str(path)), str(path), RunDirectoryError)
        tree = config.model_dump(mode="json")
        tree.get("quantization", {}).pop("contents", None)  # of whole files
        run = Start(self._folder.name, self._folder, verb, plain(tree))
        for name in config.run.track:
            self._start(name, run)
        for line in metrics.splitlines():
            with suppress(ValueError):  # a damaged line has no figures to record
                self.log(json.loads(line))

    def _start(self, name: str, run: Start) -> None:
        known = self._known.runs.get(name)
        try:
            with _apart():
                tracker = TRACKERS[name]()
                found = tracker.start(run, None if known is None else known.id)
        except (Exception, SystemExit) as error:  # of the tool, which may raise anything
            if known is None:
                raise ConfigError(
                    f"`run.track={name}` cannot start to record ({_described(error)}): check the settings of {name}, "
                    "or remove `run.track`"
                ) from None
            self._drop(name, error)
            return
        self._trackers[name] = tracker
        self._record(name, found, 0 if known is None or tracker.replaces else known.lines)

    def log(self, values: Mapping[str, Any]) -> None:
        """Pass on a line of the metrics to all trackers that do not have it yet."""
        self._epoch = values.get("epoch", self._epoch)
        phase = values.get("phase", "run")
        figures = _figures({key: value for key, value in values.items() if key != "epoch"}, phase)
        self._lines += 1
        for name in list(self._trackers):
            known = self._known.runs[name]
            if self._lines > known.lines and self._attempt(
                name, lambda tracker: tracker.log(figures, self._epoch)
            ):
                self._record(name, known.id, self._lines)

    def end(self, status: Status, results: Mapping[str, Any] | None = None) -> None:
        """End all trackers; ``results`` are those of a finished run."""
        written = [path for pattern in ARTIFACTS for path in sorted(self._folder.glob(pattern))]
        shown = tuple(path for path in written if not path.name.startswith("."))
        end = End(
            status,
            self._epoch,
            _figures(results or {}, "result"),
            () if results is None else shown,
        )
        for name in list(self._trackers):
            self._attempt(name, lambda tracker: tracker.end(end))
        self._trackers.clear()

    def _attempt(self, name: str, call: Callable[[Tracker], None]) -> bool:
        """Whether the tracker did it; one that fails is dropped."""
        try:
            with _apart():
                call(self._trackers[name])
        except (Exception, SystemExit) as error:  # of the tool, which may raise anything
            self._drop(name, error)
            return False
        return True

    def _drop(self, name: str, error: BaseException) -> None:
        self._trackers.pop(name, None)
        self._note(
            f"{name} has failed ({_described(error)}): the run continues without it; a resumed run tries again"
        )

    def _record(self, name: str, identifier: str, lines: int) -> None:
        """Keep in the run directory what a tracker has."""
        self._known.runs[name] = TrackedRun(id=identifier, lines=lines)
        write_text(self._folder / FILE, self._known.model_dump_json(indent=2) + "\n")


@contextmanager
def _apart() -> Iterator[None]:
    """Within the context a tool works: what it prints goes to stderr, what it draws moves no random numbers."""
    before = random_state()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        set_random_state(before)


def _figures(values: Mapping[str, Any], phase: str) -> dict[str, float]:
    """The finite numbers among ``values``, as ``phase/name``."""
    return {
        f"{phase}/{key}": float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)[:200]}" if str(error) else type(error).__name__
