"""Run directories: started, resumed and replaced, also after a crash."""

from pathlib import Path

import pytest

from saqcli.config import RunConfig, resolve
from saqcli.errors import RunDirectoryError
from saqcli.runs.directory import RunDirectory


@pytest.fixture
def config() -> RunConfig:
    return resolve(options={"model.name": "resnet18"})


@pytest.fixture
def finished(tmp_path: Path, config: RunConfig) -> Path:
    run = RunDirectory.start(tmp_path / "run", config, resume=False, overwrite=False)
    with run.recorded():
        run.log(phase="float", loss=1.0)
        run.save_checkpoint({"epoch": 3})
        run.finish({"top1": 90.0})
    return run.path


def test_metrics_are_truncated_to_checkpoint(tmp_path: Path, config: RunConfig) -> None:
    run = RunDirectory.start(tmp_path / "run", config, resume=False, overwrite=False)
    run.log(phase="float", loss=1.0)
    run.save_checkpoint({"epoch": 1})
    run.log(phase="train", loss=float("inf"))
    again = RunDirectory.start(tmp_path / "run", config, resume=True, overwrite=False)

    again.restore_metrics(again.load_checkpoint())

    assert (again.path / "metrics.jsonl").read_text() == '{"phase": "float", "loss": 1.0}\n'


def test_interrupted_overwrite_is_not_the_old_run(
    finished: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(run: RunDirectory) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "_clear", killed)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory.start(finished, config, resume=False, overwrite=True)
    assert RunDirectory.open(finished).manifest().status == "clearing"

    run = RunDirectory(finished)
    assert not run.check_usable(resume=True, overwrite=False)
    RunDirectory.start(finished, config, resume=True, overwrite=False)
    assert run.load_checkpoint() is None
    assert run.manifest().status == "running"
    assert run.manifest().results == {}


@pytest.mark.parametrize("left", [[], ["config.json"], [".unfinished-manifest.x.json", "config.json"]])
def test_run_crashed_at_start_is_restarted(left: list[str], tmp_path: Path, config: RunConfig) -> None:
    for name in left:
        (tmp_path / name).write_text("{")

    RunDirectory.start(tmp_path, config, resume=False, overwrite=False)

    assert RunDirectory.open(tmp_path).config() == config
    assert not list(tmp_path.glob(".unfinished*"))


def test_finished_run_is_protected(finished: Path, config: RunConfig) -> None:
    with pytest.raises(RunDirectoryError, match="already holds a finished run: use `resume=True`"):
        RunDirectory.start(finished, config, resume=False, overwrite=False)
    with pytest.raises(
        RunDirectoryError, match="holds a run of `saq quantize`, which `saq search` cannot resume"
    ):
        RunDirectory.start(finished, config, resume=True, overwrite=False, verb="search")

    assert RunDirectory(finished).load_checkpoint() is not None
