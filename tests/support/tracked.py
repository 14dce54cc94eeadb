"""What trackers have recorded, read back from their stores on this machine."""

import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from saqcli.runs.trackers import TRACKERS
from saqcli.serialization import read_json

Points = dict[str, list[tuple[int, float]]]  # (step, value) by the name of the figure


@dataclass
class Recorded:
    """One run in the store of a tracker."""

    points: Points = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    status: str | None = None

    def add(self, name: str, step: float, value: float) -> None:
        self.points.setdefault(name, []).append((int(step), value))


def needs(tracker: str) -> None:
    """Skip where the tool of a tracker is not installed."""
    entry = TRACKERS[tracker]
    if find_spec(entry.package) is None:
        pytest.skip(f'needs {entry.package}: pip install "{entry.install}"')


def at_home(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let all tools write below ``folder``, into a project of its name, and use no network."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": (folder / "mlflow").as_uri(),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(folder / "trackio"),  # read once, when it is imported
        "TRACKIO_PROJECT": folder.name,
    }
    for name, value in places.items():
        patch.setenv(name, value)
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # its service has read the environment


def tensorboard(run: Path, home: Path) -> list[Recorded]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = Recorded()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.add(name, event.step, event.value)
    for tag, content in events.PluginTagToContent("hparams").items():
        data = plugin_data_pb2.HParamsPluginData.FromString(content)
        if tag == metadata.SESSION_START_INFO_TAG:
            for key, value in data.session_start_info.hparams.items():
                found.settings[key] = str(getattr(value, value.WhichOneof("kind")))
        if tag == metadata.SESSION_END_INFO_TAG:
            found.status = api_pb2.Status.Name(data.session_end_info.status)
    text = "status/text_summary"
    if text in events.Tags()["tensors"]:
        found.status = f"{found.status} {events.Tensors(text)[-1].tensor_proto.string_val[0].decode()}"
    return [found]


def mlflow(run: Path, home: Path) -> list[Recorded]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("saq")
    runs = []
    for each in client.search_runs([experiment.experiment_id]):
        found = Recorded(settings=each.data.params, status=each.info.status)
        for name in each.data.metrics:
            for metric in client.get_metric_history(each.info.run_id, name):
                found.add(name, metric.step, metric.value)
        runs.append(found)
    return runs


def trackio(run: Path, home: Path) -> list[Recorded]:
    from trackio.sqlite_storage import SQLiteStorage

    runs = []
    for name in SQLiteStorage.get_runs(home.name):
        config = SQLiteStorage.get_run_config(home.name, name) or {}
        found = Recorded(settings={key: str(value) for key, value in config.items()})
        for entry in SQLiteStorage.get_logs(home.name, name):
            found.status = entry.get("status", found.status)
            for key, value in entry.items():
                if "/" in key and isinstance(value, int | float):
                    found.add(key, entry["step"], value)
        runs.append(found)
    return runs


def wandb(run: Path, home: Path) -> list[Recorded]:
    """One run for each identifier; every process wrote a file of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs: dict[str, Recorded] = {}
    for file in sorted(home.glob("wandb/offline-run-*/*.wandb")):
        found = runs.setdefault(file.stem, Recorded())
        deadline = time.monotonic() + 20  # a process of wandb's own writes the file, and may do so later
        records: list[Any] = []
        while not any(record.HasField("exit") for record in records) and time.monotonic() < deadline:
            records = [Record.FromString(content) for content in _records(file.read_bytes())]
            time.sleep(0.05)
        for record in records:
            if record.HasField("run"):
                found.settings |= {item.key: item.value_json for item in record.run.config.update}
            if record.HasField("history"):
                items = {_key(item): read_json(item.value_json, str(file)) for item in record.history.item}
                for key, value in items.items():
                    if "/" in key:
                        found.add(key, items["epoch"], value)
            if record.HasField("summary"):
                for item in record.summary.update:
                    value = read_json(item.value_json, str(file))
                    if _key(item).startswith("result/"):
                        found.points[_key(item)] = [(0, value)]
                    found.status = value if _key(item) == "status" else found.status
            if record.HasField("exit"):
                found.status = f"{found.status} {record.exit.exit_code}"
    return list(runs.values())


def _key(item: Any) -> str:
    return str(item.key or "/".join(item.nested_key))


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a log in blocks of 32 KiB, as LevelDB writes them, after 7 bytes of its own."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):  # not yet written
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last
            yield parts
            parts = b""


READERS: dict[str, Callable[[Path, Path], list[Recorded]]] = {
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "trackio": trackio,
    "wandb": wandb,
}
STATUSES = {
    "tensorboard": {
        "finished": "STATUS_SUCCESS finished",
        "failed": "STATUS_FAILURE failed",
        "interrupted": "STATUS_FAILURE interrupted",
    },
    "mlflow": {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"},
    "trackio": {"finished": "finished", "failed": "failed", "interrupted": "interrupted"},
    "wandb": {"finished": "finished 0", "failed": "failed 1", "interrupted": "interrupted 1"},
}
