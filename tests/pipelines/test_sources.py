"""Targets of commands: the same mistake gives the same message in every command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saqcli.api.sources import ANALYZED, EVALUATED, QUANTIZED, find_source, is_path, policy_file
from saqcli.config import RunConfig, resolve
from saqcli.errors import SaqError
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.runs.directory import RunDirectory
from tests.support.command_line import answer, last_error, saq

MODEL = "saq/resnet8s"
LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")


@pytest.fixture
def config() -> RunConfig:
    return resolve(options={"model.name": MODEL, "quantization.bits": "4"})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Passed as data, never read."""
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
    return tmp_path / "images"


def begin(path: Path, config: RunConfig, verb: str = "quantize") -> RunDirectory:
    return RunDirectory.start(path, config, resume=False, overwrite=False, verb=verb)


def searched(path: Path, config: RunConfig) -> Path:
    """A finished search."""
    run = begin(path, config, "search")
    with run.recorded():
        four = LayerBits(weight=4, activation=4)
        run.policy_path.write_text(BitConfig(model=MODEL, layers=dict.fromkeys(LAYERS, four)).to_json())
        run.finish({})
    return path


def killed(path: Path, config: RunConfig) -> int:
    """A run whose process was killed, and the process id."""
    run = begin(path, config)
    lock = (path / ".lock").read_text()
    run._lock.release()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (path / ".lock").write_text(json.dumps({**json.loads(lock), "pid": ended.pid}))
    return ended.pid


def messages_of(images: Path, target: object) -> dict[str, str]:
    """The message of every command about ``target``."""
    given = {
        "eval": ("--data", images),
        "analyze": ("--data", images),
        "export": ("--onnx", images / "model.onnx"),
        "rerun": (),
    }
    results = {command: saq(command, target, *more, "--quiet") for command, more in given.items()}
    assert {result.exit_code for result in results.values()} == {1}, results
    assert not (images / "model.onnx").exists()
    return {command: last_error(result) for command, result in results.items()}


@pytest.mark.parametrize("name", ["nosuch", "./nosuch", "runs/nosuch", "nosuch/", "~/nosuch-run"])
def test_missing_run_is_reported_by_all_commands(images: Path, name: str) -> None:
    for command, line in messages_of(images, name).items():
        assert "there is no run directory or file " in line, command


def test_missing_run_suggests_similar_paths(images: Path, tmp_path: Path, config: RunConfig) -> None:
    searched(tmp_path / "resnet8-w4a4", config)

    for line in messages_of(images, tmp_path / "resnet8-w4a3").values():
        assert line.endswith(f"similar: {tmp_path / 'resnet8-w4a4'}")


def test_non_run_folders_give_advice(images: Path, tmp_path: Path, config: RunConfig) -> None:
    run = searched(tmp_path / "place" / "found", config)
    searched(tmp_path / "place" / "other", config)
    inside = run / "artifacts"
    inside.mkdir()
    (tmp_path / "empty").mkdir()
    for folder, says in (
        (images, "if it holds images, give it as --data"),
        (tmp_path / "place", f"contains run directories but is not one: give one of them, such as {run}"),
        (inside, f"a folder inside a run: give the run directory, {run}"),
        (tmp_path / "empty", "it has no manifest.json"),
    ):
        for line in messages_of(images, folder).values():
            assert says in line


def test_non_model_files_give_advice(images: Path, tmp_path: Path, config: RunConfig) -> None:
    run = searched(tmp_path / "found", config)
    (run / "report.md").touch()
    for name in ("weights.pth", "policy.json", "notes.txt"):
        (tmp_path / name).touch()
    for path, says in (
        (run / "report.md", f"a file inside a run: give the run directory, {run}"),
        (run / "policy.json", f"a file inside a run: give the run directory, {run}"),
        (tmp_path / "policy.json", f"MODEL --policy {tmp_path / 'policy.json'}"),
        (tmp_path / "weights.pth", f"MODEL --weights {tmp_path / 'weights.pth'}"),
        (tmp_path / "notes.txt", "not a model file of saq"),
    ):
        for line in messages_of(images, path).values():
            assert says in line


def test_search_run_suggests_quantize_policy(images: Path, tmp_path: Path, config: RunConfig) -> None:
    run = searched(tmp_path / "found", config)
    step = f"quantize to its bits with `saq quantize {MODEL} --policy {run}`"

    for command in ("eval", "analyze", "export"):
        given = ("--onnx", tmp_path / "x.onnx") if command == "export" else ("--data", images)
        line = last_error(saq(command, f"{run}/", *given))
        assert line == f"error: {run} is a run of `saq search`, which holds bits but no model: {step}"
    resumed = saq("quantize", "--run-dir", run, "--resume")
    assert f"which `saq quantize` cannot resume: {step}" in last_error(resumed)
    assert f"not a model: {step}" in last_error(saq("quantize", run, "--bits", 4, "--data", images))


def test_killed_run_is_interrupted_for_all_commands(images: Path, tmp_path: Path, config: RunConfig) -> None:
    pid = killed(tmp_path / "run", config)

    for line in messages_of(images, tmp_path / "run").values():
        assert f"was interrupted (process {pid} was killed)" in line
        assert f"resume with `saq quantize --run-dir {tmp_path / 'run'} --resume`" in line
        assert "running" not in line
    again = saq("quantize", MODEL, "--bits", 4, "--data", images, "--run-dir", tmp_path / "run")
    assert "already holds an interrupted run: use --resume to continue it" in last_error(again)


def test_active_run_is_reported_as_running(images: Path, tmp_path: Path, config: RunConfig) -> None:
    run = begin(tmp_path / "run", config)
    try:
        for line in messages_of(images, run.path).values():
            assert f"is still running (process {os.getpid()} on " in line
            assert "wait for it" in line
    finally:
        run._lock.release()


def test_interrupted_and_failed_runs_say_so(images: Path, tmp_path: Path, config: RunConfig) -> None:
    for error, state in ((KeyboardInterrupt, "was interrupted"), (ValueError, "failed")):
        run = begin(tmp_path / state, config)
        with pytest.raises((SaqError, ValueError)), run.recorded():
            raise error
        for line in messages_of(images, run.path).values():
            assert f"{state}" in line
            assert "resume with `saq quantize --run-dir" in line


def test_model_names_are_not_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("resnet18", "timm/resnet18.a1_in1k", "torchvision/resnet18", "saq/resnet20"):
        assert not is_path(name)
        assert find_source(name, EVALUATED).kind == "model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()  # a folder of that name is no run
    assert find_source("resnet18", ANALYZED).kind == "model"
    with pytest.raises(SaqError, match="not quantized: quantize it with `saq quantize saq/resnet20`"):
        find_source("saq/resnet20", QUANTIZED)
    with pytest.raises(SaqError, match=r"did you mean .*timm/resnet18"):
        find_source("resnt18", EVALUATED)


def test_policy_may_be_a_run(tmp_path: Path, config: RunConfig) -> None:
    plain = answer("profile", MODEL, "--bits", "w3a5")
    four = answer("profile", MODEL, "--bits", 4)
    run = searched(tmp_path / "found", config)
    layers = {
        row["name"]: LayerBits(weight=row["weight_bits"], activation=row["activation_bits"])
        for row in plain["layers"]
    }
    (run / "policy.json").write_text(BitConfig(model=MODEL, layers=layers).to_json())

    for text in (str(run), f"{run}/", str(run / "policy.json")):
        assert policy_file(text) == run / "policy.json"
        assert answer("profile", MODEL, "--policy", text)["bops"] == plain["bops"] != four["bops"]
    plan: dict[str, Any] = answer("quantize", MODEL, "--no-pretrained", "--policy", run, "--dry-run")
    assert plan["profile"]["bops"] == plain["bops"]
    (run / "policy.json").unlink()
    refused = saq("profile", MODEL, "--policy", run)
    assert f"--policy {run} holds no policy.json" in last_error(refused)
    shutil.rmtree(run)
    assert f"--policy {run} cannot be read" in last_error(saq("profile", MODEL, "--policy", run))
