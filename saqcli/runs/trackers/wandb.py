"""Weights & Biases: a run of a project, online, or offline with ``WANDB_MODE=offline``.

``WANDB_PROJECT`` names the project. A resumed run has the same identifier: online it is the same run, offline it is a
further folder that ``wandb sync`` adds to the same run.
"""

import os
from collections.abc import Mapping
from typing import Any

from saqcli.runs.trackers.base import PROJECT, End, Start, Tracker


class WandB(Tracker):
    """Configuration, figures over the epoch, and a summary; files are named and not uploaded."""

    package, install = "wandb", "saq[wandb]"

    def start(self, run: Start, known: str | None) -> str:
        """A new run of the project, or the known one."""
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=known,
            resume="allow",
            job_type=run.verb,
            config={**run.settings, "run_dir": str(run.folder)},
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")
        return str(self._run.id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures over the epoch; the steps of the tool itself only count."""
        self._run.log({**figures, "epoch": step})

    def end(self, end: End) -> None:
        """The results, the status and the paths of the files in the summary; a run that did not finish has failed."""
        files = {"artifacts": [str(path) for path in end.artifacts]} if end.artifacts else {}
        self._run.summary.update({**end.figures, **files, "status": end.status})
        self._run.finish(exit_code=0 if end.status == "finished" else 1)
