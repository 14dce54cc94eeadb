"""Trackio: a run of a project in its local database, or on a Space of the Hugging Face Hub.

``TRACKIO_DIR`` names the folder of the database, ``TRACKIO_SPACE_ID`` a Space, ``TRACKIO_PROJECT`` the project. Trackio
has no status of runs: it is logged as a text.
"""

import os
from collections.abc import Mapping
from secrets import token_hex
from typing import Any

from saqcli.runs.trackers.base import PROJECT, End, Start, Tracker


class Trackio(Tracker):
    """Configuration and figures of a run; the last entry has results, status and the paths of the files."""

    package, install = "trackio", "saq[trackio]"

    def start(self, run: Start, known: str | None) -> str:
        """A new run of the project, or the known one; its name, which is what Trackio resumes by."""
        import trackio

        name = known or f"{run.name}-{token_hex(3)}"
        self._run: Any = trackio.init(
            os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=name,
            resume="never" if known is None else "allow",
            config={**run.settings, "verb": run.verb, "run_dir": str(run.folder)},
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        self._finish: Any = trackio.finish  # of the run that was begun last in this process
        return name

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures at an epoch."""
        self._run.log(dict(figures), step=step)

    def end(self, end: End) -> None:
        """A last entry."""
        files = {"artifacts": [str(path) for path in end.artifacts]} if end.artifacts else {}
        self._run.log({**end.figures, **files, "status": end.status}, step=end.step)
        self._finish()
