"""MLflow: a run of an experiment on a server, or in a local store.

``MLFLOW_TRACKING_URI`` names the server or the store, ``MLFLOW_EXPERIMENT_NAME`` the experiment. A resumed run is the
same run of MLflow, which is ``RUNNING`` again.
"""

import os
from collections.abc import Mapping
from itertools import islice

from saqcli.runs.trackers.base import PROJECT, End, Start, Status, Tracker

STATUS: dict[Status, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
BATCH = 100  # parameters in one request
LONGEST = 500  # characters of a parameter, which older servers accept


class MLflow(Tracker):
    """Parameters, metrics and status of a run; files are named in its tags and not uploaded."""

    package, install = "mlflow", "saq[mlflow]"

    def start(self, run: Start, known: str | None) -> str:
        """A new run of the experiment, or the known one."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tags = {"saq.verb": run.verb, "saq.run_dir": str(run.folder)}
        self._id = str(self._client.create_run(number, run_name=run.name, tags=tags).info.run_id)
        left = iter(run.settings.items())
        while part := list(islice(left, BATCH)):
            params = [Param(key, str(value)[:LONGEST]) for key, value in part]
            self._client.log_batch(self._id, params=params)
        return self._id

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Metrics."""
        for name, value in figures.items():
            self._client.log_metric(self._id, name, value, step=step)

    def end(self, end: End) -> None:
        """Metrics of the results, tags with the paths of the files, and the status."""
        self.log(end.figures, end.step)
        for path in end.artifacts:
            self._client.set_tag(self._id, f"saq.artifact.{path.name}", str(path))
        self._client.set_terminated(self._id, STATUS[end.status])
