"""The interface of trackers: one adapter for each tool that records experiments."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from saqcli.serialization import json_text

Status = Literal["finished", "failed", "interrupted"]
PROJECT = "saq"  # project or experiment, where the environment names no other


@dataclass(frozen=True)
class Start:
    """A run at its start.

    Attributes:
        name: of the run directory.
        folder: the run directory, absolute.
        verb: the command of saq.
        settings: all resolved settings, ``section.key`` to a plain value.
    """

    name: str
    folder: Path
    verb: str
    settings: Mapping[str, bool | int | float | str]


@dataclass(frozen=True)
class End:
    """A run at its end.

    Attributes:
        status: how it ended.
        step: of the last figures.
        figures: the numbers of its results, as ``result/top1``; none if it did not finish.
        artifacts: files that it wrote, absolute; none if it did not finish.
    """

    status: Status
    step: int
    figures: Mapping[str, float]
    artifacts: tuple[Path, ...]


class Tracker(ABC):
    """Records one run with a tool, on the first rank only.

    To write one, implement the three methods and set ``package`` and ``install``. The tool is imported in ``start``, so
    that the class can be imported where the tool is not installed. Any error of a method ends the tracking, not the
    run, except that of ``start`` for a new run. What a tool prints goes to stderr, and the random numbers that it draws
    do not move those of the run.

    Attributes:
        package: module that must be importable.
        install: what to give pip to install it.
        replaces: whether ``start`` removes what an earlier process recorded of this run: all figures are logged again.
    """

    package: ClassVar[str] = ""
    install: ClassVar[str] = ""
    replaces: ClassVar[bool] = False

    @abstractmethod
    def start(self, run: Start, known: str | None) -> str:
        """Begin to record.

        Args:
            run: what is recorded.
            known: identifier of this run, which is resumed; None for a new one.

        Returns:
            The identifier, which the run directory keeps.
        """

    @abstractmethod
    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record finite figures, named ``phase/figure``, at an epoch; 0 is before the first."""

    @abstractmethod
    def end(self, end: End) -> None:
        """Record the end of the run, and write out everything."""


def plain(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as ``section.key`` to plain values; lists as JSON, and None as ``none``.

    Example:
        >>> plain({"training": {"lr": 0.1, "milestones": [], "rho": None}})
        {'training.lr': 0.1, 'training.milestones': '[]', 'training.rho': 'none'}
    """
    found: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= plain(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            found[prefix + key] = value
        else:
            found[prefix + key] = "none" if value is None else json_text(value)
    return found
