"""Runs that are not named: the latest one, a folder's only one; and the images that a run brings."""

from pathlib import Path

import pytest

from saqcli.cli.options import Given
from saqcli.cli.run_options import images_for
from saqcli.config import resolve_into
from saqcli.errors import DataError, Problems, RunDirectoryError
from saqcli.runs.directory import RunDirectory
from saqcli.runs.images import data_of_run
from saqcli.runs.listing import runs_in, take_run
from tests.support.command_line import last_error, saq
from tests.support.runs import make_run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestTaken:
    @pytest.mark.parametrize("text", [None, "latest"])
    def test_latest_run_with_a_model_is_taken(self, text: str | None) -> None:
        make_run("runs/b", age=9)
        make_run("runs/c", age=5)
        make_run("runs/a", age=1, model=False, verb="search")

        taken = take_run(text, "a model")

        assert taken.text == str(Path("runs/c"))
        assert taken.note == "using runs/c, the latest run with a model, since runs/a is newer and holds none"
        assert take_run(text, "a finished run").text == str(Path("runs/a"))

    def test_folder_with_one_run_is_that_run(self) -> None:
        inside = make_run("work/only", age=1)

        assert take_run("work", "a model") == (str(inside), "using work/only, the only run in work")
        assert take_run(str(inside), "a model") == (str(inside), None)

    def test_folder_with_two_runs_is_left_to_the_command(self) -> None:
        make_run("work/a", age=1)
        make_run("work/b", age=1)

        assert take_run("work", "a model") == ("work", None)
        result = saq("export", "work")
        assert result.exit_code == 1
        assert "contains run directories but is not one: give one of them, such as work/a" in last_error(
            result
        )

    def test_name_of_a_model_wins_over_a_folder(self) -> None:
        make_run("resnet18/run", age=1)

        assert take_run("resnet18", "a model", is_model=lambda name: True) == ("resnet18", None)

    def test_runs_are_found_two_levels_deep_newest_first(self) -> None:
        make_run("runs/old", age=7)
        make_run("runs/demo/quantized", age=2)
        make_run("runs/demo/quantized/artifacts/deeper", age=0)

        assert runs_in(Path("runs")) == [Path("runs/demo/quantized"), Path("runs/old")]

    @pytest.mark.parametrize("command", ["eval", "export", "analyze", "profile", "rerun"])
    def test_command_without_any_run_says_what_to_do(self, command: str) -> None:
        result = saq(command)

        assert result.exit_code == 1
        assert last_error(result) == (
            "error: there is no run in runs/: give a run directory, or make one with `saq quantize`"
        )

    def test_runs_without_a_model_are_named(self) -> None:
        make_run("runs/a", age=1, model=False, finished=False)

        with pytest.raises(RunDirectoryError, match=r"holds a model \(the latest is runs/a, a run of `saq q"):
            take_run(None, "a model")

    def test_damaged_runs_are_passed_over(self) -> None:
        make_run("runs/good", age=5)
        Path("runs/bad/artifacts").mkdir(parents=True)
        Path("runs/bad/manifest.json").write_text("{")

        assert take_run(None, "a finished run").text == str(Path("runs/good"))


class TestImages:
    def test_relative_paths_refer_to_the_folder_of_the_run(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (here / "images").mkdir()
        run = make_run("runs/a", age=1, path="images", class_order="torchvision").absolute()
        assert data_of_run(RunDirectory.open(run)).path == "images"
        (here / "elsewhere").mkdir()
        monkeypatch.chdir(here / "elsewhere")

        found = data_of_run(RunDirectory.open(run))

        assert found.path == str(here / "images")
        assert found.class_order is None

    @pytest.mark.parametrize(
        ("data", "elsewhere"),
        [
            ("torch/image_folder", "torch/image_folder@{start}"),
            ("torch/mnist@stored", "torch/mnist@{start}/stored"),
            ("torch/mnist@/nowhere", "torch/mnist@/nowhere"),
            ("wds/stored", "wds/stored@{start}/stored"),
            ("wds/https://host/stored", "wds/https://host/stored"),
            ("wds/stored@pipe:cat stored", "wds/stored@pipe:cat stored"),
            ("hfds/owner/name", "hfds/owner/name"),
            ("torch/folder", "{start}/torch/folder"),
        ],
    )
    def test_named_sets_are_stored_relative_to_the_folder_of_the_run(
        self, data: str, elsewhere: str, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("stored", "elsewhere", "torch/folder"):
            (here / name).mkdir(parents=True)
        run = make_run("runs/a", age=1, path=data).absolute()
        assert data_of_run(RunDirectory.open(run)).path == data
        monkeypatch.chdir(here / "elsewhere")

        assert data_of_run(RunDirectory.open(run)).path == elsewhere.format(start=here)

    @pytest.mark.parametrize("data", ["torch/mnist", "torch/image_folder", "wds/shards", "images"])
    def test_export_without_the_images_says_so(
        self, data: str, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (here / "images" / "train" / "cat").mkdir(parents=True)  # without val/
        run = make_run("runs/a", age=1, path=data).absolute()

        found = images_for(Given(), str(run), json_output=False, quiet=False, optional=True)

        assert found.path is None
        said = " ".join(capsys.readouterr().err.split())
        assert said.endswith("; synthetic images are used")
        assert said.count(data) >= 1

    def test_moved_images_are_reported_with_the_remedy(self) -> None:
        run = make_run("runs/a", age=1, path="images")

        with pytest.raises(
            DataError, match=r"no longer in .*/images: give their new place as `data.path=DIR`"
        ):
            data_of_run(RunDirectory.open(run))
        assert "--data DIR" in last_error(saq("eval", run))

    def test_unlabelled_images_measure_no_accuracy(self) -> None:
        Path("photos").mkdir()
        run = make_run("runs/a", age=1, calibration="photos")

        assert data_of_run(RunDirectory.open(run)).calibration == "photos"
        assert "photos holds images without labels" in last_error(saq("eval", run))

    def test_variable_names_the_default_data(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SAQ_DATA", "named")

        for command in ("eval", "quantize"):
            bits = ["--bits", "4"] if command == "quantize" else []
            result = saq(command, "saq/resnet8s", "--no-pretrained", *bits)
            assert "there is no folder named" in last_error(result)
        result = saq("eval", "saq/resnet8s", "--no-pretrained", "--data", "given")
        assert "there is no folder given" in last_error(result)

    def test_variable_is_not_used_beside_images_for_calibration(self) -> None:
        named = {"model.name": "saq/resnet8s", "data.calibration": "photos"}
        for more, path, epochs in (({}, None, 0), ({"data.path": "given"}, "given", 3)):
            found = resolve_into(
                Problems(), recipe=None, file=None, assignments=None, options=named | more, images="named"
            )
            assert found is not None
            assert (found.data.path, found.training.epochs) == (path, epochs)

    def test_run_wins_over_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SAQ_DATA", "named")
        run = make_run("runs/a", age=1, path="images")

        assert "no longer in" in last_error(saq("eval", run))

    def test_unfinished_run_is_exported_to_a_named_file_only(self) -> None:
        run = make_run("runs/a", age=1, finished=False)

        assert "only a finished run has files in its artifacts: give --onnx FILE" in last_error(
            saq("export", run)
        )
