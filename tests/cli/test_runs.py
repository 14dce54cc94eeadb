"""``saq runs``: listed, shown, removed; two of them compared are tested with reruns."""

import os
from pathlib import Path

import pytest

from saqcli.config import resolve
from saqcli.runs.directory import RunDirectory
from tests.support.command_line import answer, last_error, saq
from tests.support.runs import make_run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_are_listed_newest_first() -> None:
    make_run("runs/a", age=130, results={"top1": 91.236, "bops": 34_000_000_000})
    make_run("runs/b", age=2, finished=False)
    make_run("runs/c", age=1, verb="search", model=False, results={"bops": 5_000_000})
    Path("runs/d").mkdir()
    (Path("runs/d") / "manifest.json").write_text("{")
    os.utime("runs/d/manifest.json", (0, 0))

    lines = [line.split() for line in saq("runs").stdout.splitlines()]

    assert lines[0] == ["run", "network", "bits", "top-1", "BOPs", "state", "age"]
    assert lines[1] == ["runs/c", "resnet18", "4", "-", "5", "M", "finished", "search", "1", "min"]
    assert lines[2] == ["runs/b", "resnet18", "4", "-", "-", "interrupted", "2", "min"]
    assert lines[3] == ["runs/a", "resnet18", "4", "91.24", "%", "34", "G", "finished", "2", "h"]
    assert lines[4][:6] == ["runs/d", "-", "-", "-", "-", "damaged"]
    found = answer("runs", "list", "runs")["runs"]
    assert [each["state"] for each in found] == ["finished", "interrupted", "finished", "damaged"]
    assert found[2]["top1"] == 91.236


def test_no_runs_is_an_answer() -> None:
    assert saq("runs").stdout == "no runs in runs/\n"
    assert answer("runs") == {"runs": []}


def test_latest_run_is_shown() -> None:
    make_run("runs/old", age=9)
    run = make_run("runs/new", age=1, results={"top1": 70.0, "size_bytes": 5000})

    result = saq("runs", "show")

    assert result.stdout.startswith("runs/new, a run of `saq quantize`")
    assert "5 KB" in result.stdout
    shown = answer("runs", "show", run)
    assert shown["figures"] == {"top1": 70.0, "size_bytes": 5000}
    assert shown["artifacts"] == ["runs/new/artifacts/model.safetensors"]


def test_interrupted_run_says_what_comes_next() -> None:
    run = make_run("runs/a", age=1, finished=False)

    assert "saq quantize --run-dir runs/a --resume" in saq("runs", "show", run).stdout


class TestRemoving:
    def test_removes_the_files_of_the_run_only(self) -> None:
        run, other = make_run("runs/a", age=1), make_run("runs/b", age=2)
        (other / "mine.txt").touch()

        result = saq("runs", "rm", run, other, "--yes")

        assert result.exit_code == 0
        assert not run.exists()
        assert [path.name for path in other.iterdir()] == ["mine.txt"]
        assert "removed runs/b; its folder stays with mine.txt" in result.stdout

    def test_needs_a_confirmation(self) -> None:
        run = make_run("runs/a", age=1)

        assert "confirm it with --yes" in last_error(saq("runs", "rm", run))
        assert run.is_dir()

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ([], "needs the runs to remove"),
            (["latest"], "named only"),
            (["runs"], "contains run directories but is not one"),
            (["images"], "is not a run directory"),
            (["link"], "is a link: give the directory itself"),
            (["nosuch/"], "there is no run directory"),
        ],
    )
    def test_refuses_what_is_no_named_run(self, given: list[str], says: str) -> None:
        make_run("runs/a", age=1)
        Path("images").mkdir()
        Path("link").symlink_to("runs/a")

        result = saq("runs", "rm", *given, "--yes")

        assert result.exit_code == 1
        assert says in last_error(result)
        assert Path("runs/a/manifest.json").is_file()

    def test_refuses_a_run_in_use_and_removes_none(self) -> None:
        config = resolve(options={"model.name": "resnet18", "quantization.bits": "4"})
        idle = make_run("runs/b", age=1)
        run = RunDirectory.start(Path("runs/a"), config, resume=False, overwrite=False)

        with run.recorded():
            result = saq("runs", "rm", idle, "runs/a", "--yes")
            assert answer("runs")["runs"][0]["state"] == "running"

        assert "runs/a is in use by process" in last_error(result)
        assert idle.is_dir()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["compare", "runs/a"], "compares two runs, and 1 were given"),
        (["compare", "runs/a", "runs/b"], "there is no run directory or file runs/b"),
        (["show", "runs/a", "runs/a"], "shows one run, and 2 were given"),
        (["runs"], "ACTION runs is not known: give `saq runs list runs`"),
        (["list", "nosuch"], "there is no folder nosuch"),
        (["list", "--yes"], "--yes belongs to `saq runs rm`"),
    ],
)
def test_misuse_is_one_line(given: list[str], says: str) -> None:
    make_run("runs/a", age=1)

    result = saq("runs", *given)

    assert result.exit_code == 1
    assert says in last_error(result)


def test_run_given_twice_is_removed_once() -> None:
    run = make_run("runs/a", age=1)

    assert answer("runs", "rm", run, f"{run}/", "--yes") == {"removed": ["runs/a"], "kept": {}}


def test_folder_that_cannot_be_removed_leaves_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("runs/a", age=1)
    monkeypatch.setattr("saqcli.runs.directory.shutil.rmtree", lambda *_, **__: None)

    assert "runs/a/checkpoints cannot be removed" in last_error(saq("runs", "rm", run, "--yes"))
    assert (Path(run) / "manifest.json").is_file()


def test_overwriting_removes_the_analysis_of_the_run_before() -> None:
    run = RunDirectory.open(Path(make_run("runs/a", age=1)))
    (run.path / "analysis").mkdir()
    (run.path / "analysis" / "sharpness.json").write_text("{}", encoding="utf-8")

    RunDirectory.start(run.path, run.config(), resume=False, overwrite=True)

    assert not (run.path / "analysis").exists()
