"""TensorBoard: event files in the folder ``tensorboard`` of the run directory.

TensorBoard shows all runs below a folder. A resumed run writes one new file with all lines up to its checkpoint, in
place of the earlier ones, so that no step is there twice.
"""

from collections.abc import Mapping
from typing import Any

from saqcli.runs.trackers.base import End, Start, Tracker

FOLDER = "tensorboard"
COMPARED = ("result/top1", "result/bops")  # in the table of hyperparameters


class TensorBoard(Tracker):
    """Event files; settings and status also for the tab of hyperparameters."""

    package, install, replaces = "tensorboard", "saq[tensorboard]", True

    def start(self, run: Start, known: str | None) -> str:
        """A new event file; those of this run that an earlier process wrote are removed."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = run.folder / FOLDER
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self._writer: Any = SummaryWriter(folder, purge_step=0)
        describe: Any = hparams
        experiment, session, _ = describe(dict(run.settings), dict.fromkeys(COMPARED, 0.0), {})
        self._summary(experiment)
        self._summary(session)
        table = [f"| {key} | {value} |" for key, value in run.settings.items()]
        self._text("settings", "\n".join(["| setting | value |", "| --- | --- |", *table]), 0)
        return FOLDER

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Scalars."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, end: End) -> None:
        """Scalars of the results, the status, and the paths of the files."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        self.log(end.figures, end.step)
        self._text("status", end.status, end.step)
        if end.artifacts:
            self._text("artifacts", "\n".join(f"- {path}" for path in end.artifacts), end.step)
        status = api_pb2.STATUS_SUCCESS if end.status == "finished" else api_pb2.STATUS_FAILURE
        about = metadata.create_summary_metadata(
            plugin_data_pb2.HParamsPluginData(session_end_info=plugin_data_pb2.SessionEndInfo(status=status))
        )
        self._summary(Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about)]))
        self._writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def _summary(self, summary: object) -> None:
        self._writer._get_file_writer().add_summary(summary)
