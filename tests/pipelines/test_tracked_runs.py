"""Commands whose runs are recorded by TensorBoard: finished, interrupted and resumed; and a tool that is missing."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from saqcli.runs.directory import RunDirectory
from tests.support.command_line import answer, last_error, last_line, saq
from tests.support.image_folders import MakeClasses
from tests.support.tracked import STATUSES, Points, needs, tensorboard

NETWORK = ("saq/resnet8s", "--no-pretrained", "--num-classes", 3, "--batch-size", 8, "--workers", 0)
QUANTIZE = (*NETWORK, "--bits", 4, "--epochs", 2, "--no-export")


@pytest.fixture
def options(make_classes: MakeClasses, tmp_path: Path) -> tuple[object, ...]:
    for split in ("train", "val"):
        make_classes(tmp_path / "images" / split, {"a": 4, "b": 4, "c": 4})
    return ("--data", tmp_path / "images", "--set", "data.augmentation=none")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def points(run: Path) -> Points:
    """The figures in ``metrics.jsonl`` over the epoch."""
    found: Points = {}
    epoch = 0
    for line in metrics(run):
        epoch = line.pop("epoch", epoch)
        phase = line.pop("phase")
        for key, value in line.items():
            if isinstance(value, int | float):
                found.setdefault(f"{phase}/{key}", []).append((epoch, value))
    return found


def check_recorded(run: Path, status: str) -> None:
    """TensorBoard has the metrics and the status, and settings of the run."""
    (found,) = tensorboard(run, run)
    recorded = {key: value for key, value in found.points.items() if not key.startswith("result/")}
    expected = points(run)
    assert recorded.keys() == expected.keys()
    for key, values in expected.items():
        assert [step for step, _ in recorded[key]] == [step for step, _ in values], key
        assert all(
            math.isclose(one, other, rel_tol=1e-6)
            for (_, one), (_, other) in zip(recorded[key], values, strict=True)
        )
    assert found.status == STATUSES["tensorboard"][status]
    assert found.settings["model.name"] == "saq/resnet8s"


def test_interrupted_run_is_resumed_in_the_record(
    options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("tensorboard")
    plain, run = tmp_path / "plain", tmp_path / "run"
    torch.manual_seed(1)  # random weights are not seeded by the run
    answer("quantize", *QUANTIZE, *options, "--run-dir", plain)
    torch.manual_seed(1)
    log = RunDirectory.log

    def interrupted(self: RunDirectory, **values: Any) -> None:
        log(self, **values)
        if (values["phase"], values.get("epoch")) == ("train", 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "log", interrupted)
        stopped = saq("quantize", *QUANTIZE, *options, "--run-dir", run, "--track", "tensorboard", "--quiet")
    assert "Resume with" in last_line(stopped)
    check_recorded(run, "interrupted")

    result = answer("quantize", "--run-dir", run, "--resume")
    check_recorded(run, "finished")
    (found,) = tensorboard(run, run)
    assert found.points["result/bops"] == [(2, result["bops"])]
    assert metrics(run) == metrics(plain)  # a tracker moves no bit


def test_failed_run_is_recorded_as_failed(
    options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("tensorboard")
    log = RunDirectory.log

    def failing(self: RunDirectory, **values: Any) -> None:
        if values["phase"] == "calibrated":
            raise RuntimeError("broken")
        log(self, **values)

    monkeypatch.setattr(RunDirectory, "log", failing)
    run = tmp_path / "run"
    assert saq("quantize", *QUANTIZE, *options, "--run-dir", run, "--track", "tensorboard").exit_code == 1

    check_recorded(run, "failed")


def test_search_is_recorded(options: tuple[object, ...], tmp_path: Path) -> None:
    needs("tensorboard")
    run = tmp_path / "run"
    budget = ("--budget", "w4a4", "--track", "tensorboard")
    result = answer("search", *NETWORK, *options, *budget, "--run-dir", run)

    (found,) = tensorboard(run, run)
    assert found.points["result/bops"] == [(0, result["bops"])]
    assert found.status == STATUSES["tensorboard"]["finished"]


def test_rerun_records_nothing(options: tuple[object, ...], tmp_path: Path) -> None:
    needs("tensorboard")
    run = tmp_path / "run"
    torch.manual_seed(1)  # random weights are not seeded by the run
    answer("search", *NETWORK, *options, "--budget", "w4a4", "--track", "tensorboard", "--run-dir", run)
    torch.manual_seed(1)
    assert answer("rerun", run)["identical"]

    assert (run / "trackers.json").is_file()
    assert not (tmp_path / "run-rerun" / "trackers.json").exists()
    assert RunDirectory.open(tmp_path / "run-rerun").config().run.track == ()


def test_missing_tool_is_refused_before_anything(
    options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = tmp_path / "run"
    for verb in (("quantize", "--bits", 4), ("search", "--budget", "w4a4")):
        done = saq(*verb, *NETWORK, *options, "--run-dir", run, "--track", "mlflow", "--quiet")
        assert last_error(done) == (
            "error: --track mlflow needs the package mlflow, which is not installed: "
            'pip install "saq[mlflow]", or remove --track'
        )
        assert done.exit_code == 1
    assert not run.exists()
