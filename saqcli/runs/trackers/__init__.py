"""Trackers: adapters to the tools that record experiments, one file each.

To add one, write a file with a ``Tracker`` and add a line to the table below; a package of its own uses an entry point
of the group ``saqcli.trackers``. The tests in ``tests/runs/test_trackers.py`` run over the table.
"""

import inspect
from typing import Any

from saqcli.plugins import Plugins
from saqcli.runs.trackers.base import End, Start, Status, Tracker
from saqcli.runs.trackers.mlflow import MLflow
from saqcli.runs.trackers.tensorboard import TensorBoard
from saqcli.runs.trackers.trackio import Trackio
from saqcli.runs.trackers.wandb import WandB

__all__ = ["TRACKERS", "End", "Start", "Status", "Tracker"]

_OURS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
    "mlflow": MLflow,
}


def _problem(tracker: Any) -> str | None:
    """Why ``tracker`` breaks the contract, or None."""
    if not (isinstance(tracker, type) and issubclass(tracker, Tracker)):
        return "it is no class derived from saqcli.runs.trackers.Tracker"
    if inspect.isabstract(tracker):
        return f"it lacks {', '.join(sorted(tracker.__abstractmethods__))}"
    if not (tracker.package and tracker.install):
        return "it names no package, or not how to install it"
    return None


TRACKERS: Plugins[type[Tracker]] = Plugins("trackers", "tracker", _OURS, _problem)
