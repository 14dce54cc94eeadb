"""Trackers: the contract of the family, what the tools' own readers find, failures, and resuming."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from saqcli.config import RunConfig, resolve
from saqcli.errors import ConfigError, RunDirectoryError, SaqError
from saqcli.runs.directory import RunDirectory
from saqcli.runs.resume import check_same_settings
from saqcli.runs.trackers import TRACKERS, End, Start, Tracker
from saqcli.runs.tracking import check_trackers
from tests.support.tracked import READERS, STATUSES, Points, at_home, needs

BEFORE: list[dict[str, Any]] = [
    {"phase": "float", "loss": 1.25, "top1": 50.0, "images": 8},
    {"phase": "train", "epoch": 1, "lr": 0.5, "loss": 0.75, "top1": float("nan")},
    {"phase": "val", "epoch": 1, "loss": 0.5, "top1": 62.5},
]
LOST = {"phase": "train", "epoch": 2, "lr": 0.25, "loss": 0.25, "top1": 75.0}
AFTER = [LOST, {"phase": "val", "epoch": 2, "top1": 87.5}, {"phase": "quantized", "top1": 87.5}]
POINTS: Points = {
    "float/loss": [(0, 1.25)],
    "float/top1": [(0, 50.0)],
    "float/images": [(0, 8.0)],
    "train/lr": [(1, 0.5), (2, 0.25)],
    "train/loss": [(1, 0.75), (2, 0.25)],
    "train/top1": [(2, 75.0)],
    "val/loss": [(1, 0.5)],
    "val/top1": [(1, 62.5), (2, 87.5)],
    "quantized/top1": [(2, 87.5)],
}


def config_of(*names: str) -> RunConfig:
    return resolve(options={"model.name": "resnet18", "run.track": names, "training.lr": 0.125})


def start(path: Path, *names: str, resume: bool = False, notes: list[str] | None = None) -> RunDirectory:
    """A run directory whose run is recorded by trackers; resumed at its checkpoint."""
    run = RunDirectory.start(path, config_of(*names), resume=resume, overwrite=False)
    run.restore_metrics(run.load_checkpoint())
    run.track(config_of(*names), [].append if notes is None else notes.append)
    return run


def end_early(run: RunDirectory, error: BaseException, *lines: dict[str, Any]) -> None:
    """Log the lines, then raise the error."""
    with run.recorded():
        for line in lines:
            run.log(**line)
        raise error


class Memory(Tracker):
    """Keeps everything, prints, draws random numbers, and fails when it is told to."""

    package, install = "json", "nothing"
    calls: ClassVar[list[Any]] = []
    failing: ClassVar[set[str]] = set()

    def _do(self, what: str, *values: Any) -> None:
        print("on stdout")
        random.random()
        if what in self.failing:
            raise OSError("no route to host\nand more")
        self.calls.append((what, *values))

    def start(self, run: Start, known: str | None) -> str:
        self._do("start", known)
        return "m1"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._do("log", *figures.items(), step)

    def end(self, end: End) -> None:
        self._do("end", end.status)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    monkeypatch.setattr(Memory, "calls", [])
    monkeypatch.setattr(Memory, "failing", set())
    monkeypatch.setitem(TRACKERS, "memory", Memory)
    return Memory


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / f"home-{abs(hash(tmp_path)) % 10**8}"
    at_home(monkeypatch, folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("name", TRACKERS)
def test_tracker_keeps_its_contract(
    name: str, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    needs(name)
    notes: list[str] = []
    run = start(tmp_path / "run", name, notes=notes)
    with pytest.raises(SaqError):
        end_early(run, SaqError("stop"), *BEFORE)
    again = start(tmp_path / "run", name, resume=True, notes=notes)
    with again.recorded():
        again.finish({"top1": 1.0})

    assert notes == []
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", READERS)
def test_reader_finds_a_finished_run(name: str, home: Path, tmp_path: Path) -> None:
    needs(name)
    run = start(tmp_path / "run", name)
    with run.recorded():
        for line in BEFORE + AFTER:
            run.log(**line)
        run.finish({"top1": 87.5, "bops": 123456, "policy": {}, "float_top1": None, "verified": True})

    (found,) = READERS[name](run.path, home)
    results = {key: found.points.pop(key)[0][1] for key in list(found.points) if key.startswith("result/")}
    assert found.points == POINTS
    assert results == {"result/top1": 87.5, "result/bops": 123456.0}
    assert found.status == STATUSES[name]["finished"]
    assert float(found.settings["training.lr"]) == 0.125
    assert found.settings["model.name"].strip('"') == "resnet18"


@pytest.mark.parametrize(
    ("error", "status"), [(SaqError("no"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
@pytest.mark.parametrize("name", READERS)
def test_reader_finds_how_a_run_ended(
    name: str, error: BaseException, status: str, home: Path, tmp_path: Path
) -> None:
    needs(name)
    run = start(tmp_path / "run", name)
    with pytest.raises(SaqError):
        end_early(run, error, BEFORE[0])

    (found,) = READERS[name](run.path, home)
    assert found.status == STATUSES[name][status]
    assert run.manifest().status == status


@pytest.mark.parametrize("name", READERS)
def test_resumed_run_repeats_no_step(name: str, home: Path, tmp_path: Path) -> None:
    needs(name)
    run = start(tmp_path / "run", name)
    for line in BEFORE:
        run.log(**line)
    run.save_checkpoint({"epoch": 1})
    with pytest.raises(SaqError):
        end_early(run, SaqError("stop"), LOST)
    again = start(tmp_path / "run", name, resume=True)
    with again.recorded():
        for line in AFTER:
            again.log(**line)
        again.finish({})

    (found,) = READERS[name](run.path, home)
    assert found.points == POINTS
    assert found.status == STATUSES[name]["finished"]


def test_overwritten_run_is_a_new_one(memory: type[Memory], tmp_path: Path) -> None:
    first = start(tmp_path / "run", "memory")
    with first.recorded():
        first.log(**BEFORE[0])
        first.finish({})
    config = config_of("memory")
    run = RunDirectory.start(first.path, config, resume=False, overwrite=True)
    run.track(config)
    run.log(**BEFORE[0])

    assert [call[0] for call in memory.calls] == ["start", "log", "end", "start", "log"]
    assert memory.calls[3] == ("start", None)


def test_failing_tracker_is_dropped_with_one_note(memory: type[Memory], tmp_path: Path) -> None:
    notes: list[str] = []
    run = start(tmp_path / "run", "memory", notes=notes)
    with run.recorded():
        run.log(**BEFORE[0])
        memory.failing.add("log")
        for line in BEFORE[1:] + AFTER:
            run.log(**line)
        run.finish({})

    assert notes == [
        "memory has failed (OSError: no route to host): the run continues without it; a resumed run tries again"
    ]
    assert [call[0] for call in memory.calls] == ["start", "log"]
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 6
    assert run.manifest().status == "finished"


def test_resumed_run_catches_up_on_missed_lines(memory: type[Memory], tmp_path: Path) -> None:
    run = start(tmp_path / "run", "memory")
    run.log(**BEFORE[0])
    memory.failing.add("log")
    for line in BEFORE[1:]:
        run.log(**line)
    run.save_checkpoint({})
    memory.failing.clear()
    again = start(tmp_path / "run", "memory", resume=True)
    again.log(**AFTER[0])

    assert memory.calls[2] == ("start", "m1")
    assert [call[-1] for call in memory.calls if call[0] == "log"] == [0, 1, 1, 2]


def test_unreachable_tracker_stops_a_new_run_only(memory: type[Memory], tmp_path: Path) -> None:
    start(tmp_path / "known", "memory")
    memory.failing.add("start")
    notes: list[str] = []
    start(tmp_path / "known", "memory", resume=True, notes=notes).log(**BEFORE[0])

    assert len(notes) == 1
    with pytest.raises(ConfigError, match=r"`run.track=memory` cannot start to record \(OSError: no route"):
        start(tmp_path / "new", "memory")


def test_trackers_print_and_draw_apart(
    memory: type[Memory], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    start(tmp_path / "run", "memory").log(**BEFORE[0])

    assert random.random() == expected
    out, err = capfd.readouterr()
    assert (out, err.count("on stdout")) == ("", 2)


def test_wrong_trackers_are_refused_together(memory: type[Memory], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "package", "no_such_package")
    monkeypatch.setattr(memory, "install", "saq[memory]")

    with pytest.raises(ConfigError) as found:
        check_trackers(("memory", "tensorbored", "tensorboard", "tensorboard"))
    first, second, third = map(str, found.value.parts[:3])
    assert first == (
        "`run.track=memory` needs the package no_such_package, which is not installed: "
        'pip install "saq[memory]", or remove `run.track`'
    )
    assert second.startswith("`run.track=tensorbored`: there is no tracker 'tensorbored': choose from")
    assert third == "`run.track=tensorboard` is given twice: give it once"


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"schema_version": 2}', '{"runs": {"memory": {"id": ""}}}', '{"runs": {"memory": 3}}'),
        *('{"runs": {"memory": {"id": "a", "lines": -1}}}', '{"more": 1}'),
    ],
)
def test_damaged_file_is_refused_with_its_name(memory: type[Memory], text: str, tmp_path: Path) -> None:
    run = start(tmp_path / "run", "memory")
    (run.path / "trackers.json").write_text(text, encoding="utf-8")

    with pytest.raises(RunDirectoryError, match=r"trackers\.json"):
        start(run.path, "memory", resume=True)


def test_trackers_may_change_on_resume(memory: type[Memory], tmp_path: Path) -> None:
    run = start(tmp_path / "run", "memory")
    assert json.loads((run.path / "config.json").read_text())["run"]["track"] == ["memory"]

    check_same_settings(run, config_of())
    run.keep_config(config_of())
    assert "track" not in json.loads((run.path / "config.json").read_text())["run"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (object(), "it is no class derived from"),
        (type("Half", (Tracker,), {"package": "json", "install": "x"}), "it lacks end, log, start"),
        (type("Nameless", (Memory,), {"package": ""}), "it names no package"),
    ],
)
def test_broken_tracker_is_no_plugin(wrong: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        TRACKERS["wrong"] = wrong
