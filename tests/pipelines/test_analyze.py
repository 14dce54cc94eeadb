"""``saq analyze`` on handwritten digits: targets, files, pictures, resume and errors."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saqcli.analysis import INSTRUMENTS, AnalysisInput
from saqcli.analysis.landscape import LandscapeReading
from saqcli.pipelines import calibration
from saqcli.report.readings import draw
from saqcli.runs.checkpoints import CheckpointFile
from saqcli.tasks.classification import Score
from tests.support.command_line import answer, last_error, last_line, saq
from tests.support.digits import MODEL, float_options


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated run without fine-tuning."""
    path = tmp_path_factory.mktemp("analyze") / "calibrated"
    options = ("--bits", 4, "--epochs", 0, "--run-dir", path, "--no-export")
    answer("quantize", MODEL, *float_options(digits, digits / "few"), *options)
    return path


@pytest.fixture(scope="module")
def data(digits: Path) -> tuple[object, ...]:
    return ("--data", digits / "few", "--images", 40)


SMALL = ("--grid", 3, "--samples", 2, "--iterations", 3, "--candidates", "2,4")


@pytest.fixture(scope="module")
def everything(run: Path, data: tuple[object, ...]) -> dict[str, Any]:
    """The readings of all instruments for the run, in its default folder."""
    found: dict[str, Any] = answer("analyze", run, *data, *SMALL, "--all")
    return found


# Locks a folder and holds the lock.
HOLD = """
import pathlib, sys
from saqcli.runs.locks import Lock
lock = Lock(pathlib.Path(sys.argv[1]))
lock.take()
print("taken", flush=True)
sys.stdin.read()
"""


class TestTargets:
    def test_every_instrument_runs_on_a_run(self, run: Path, everything: dict[str, Any]) -> None:
        assert set(everything["instruments"]) == set(INSTRUMENTS)
        assert everything["out"] == str(run / "analysis")
        assert (everything["images"], everything["split"]) == (40, "train")
        names = {Path(path).name for path in everything["files"]}
        assert names == {path.name for path in (run / "analysis").iterdir()}
        assert names >= {f"{name}.json" for name in INSTRUMENTS}
        pictures = {"landscape_contour", "landscape_surface", "sensitivity", "eigenvalue", "trace", "flips"}
        pictures |= {"distributions_weights", "distributions_inputs"}
        assert names >= {f"{name}{suffix}" for name in pictures for suffix in (".png", ".svg")}
        assert all((run / "analysis" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in pictures)

    def test_folder_in_use_is_refused(self, run: Path, data: tuple[object, ...], tmp_path: Path) -> None:
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "taken\n"
            refused = saq("analyze", run, *data, "--flips", "--out", tmp_path)
            other.kill()

        assert refused.exit_code == 1
        assert f"in use by process {other.pid}" in last_error(refused)

    def test_landscape_centre_is_evaluation_loss(self, everything: dict[str, Any]) -> None:
        readings = everything["instruments"]

        assert readings["landscape"]["loss"][1][1] == everything["loss"]
        assert readings["landscape"]["top1"][1][1] == everything["top1"]
        assert readings["sharpness"]["loss"] == readings["sensitivity"]["loss"] == everything["loss"]
        assert readings["sharpness"]["sharpness"] > 0

    def test_validation_loss_equals_eval(self, run: Path, digits: Path, tmp_path: Path) -> None:
        data = ("--data", digits / "few")
        expected = answer("eval", run, *data)

        found = answer(
            "analyze", run, *data, "--split", "val", "--images", 9999, "--sharpness", "--out", tmp_path
        )

        assert (found["images"], found["split"]) == (expected["images"], "val")
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["top1"] == expected["top1"]

    def test_another_split_is_named(self, run: Path, digits: Path, tmp_path: Path) -> None:
        for name, split in (("train", "train"), ("val", "val"), ("holdout", "val")):
            (tmp_path / name).symlink_to(digits / "few" / split)
        command = ("analyze", run, "--data", tmp_path, "--images", 40, "--flips", "--out", tmp_path / "out")

        found = answer(*command, "--split", "holdout")
        shown = saq(*command, "--split", "holdout", "--overwrite").output

        written = json.loads((tmp_path / "out" / "flips.json").read_text())["subject"]
        assert found["split"] == written["split"] == "holdout"
        assert f"on {found['images']} images of holdout" in shown
        assert "top-1 on images of holdout" in shown

    def test_latent_weights_come_from_checkpoint(
        self, run: Path, data: tuple[object, ...], tmp_path: Path, everything: dict[str, Any]
    ) -> None:
        file = run / "artifacts" / "model.safetensors"

        found = answer("analyze", file, *data, "--flips", "--distributions", "--out", tmp_path)

        assert everything["instruments"]["flips"]["reason"] is None
        assert everything["instruments"]["flips"]["flipped"] > 0
        assert everything["instruments"]["distributions"]["latent"] is True
        assert "checkpoint" in found["instruments"]["flips"]["reason"]
        assert found["instruments"]["distributions"]["latent"] is False
        assert found["loss"] == everything["loss"]
        first = found["instruments"]["distributions"]["layers"][0]["weights"]
        assert first["error"] < 1e-10  # already on the grid

    @pytest.mark.parametrize(
        "options",
        [pytest.param(("--weight-norm",), marks=pytest.mark.slow), ("--quantizer", "dorefa")],
    )
    def test_transformed_weights_have_latent_weights(
        self, digits: Path, data: tuple[object, ...], tmp_path: Path, options: tuple[str, ...]
    ) -> None:
        run = tmp_path / "run"
        quick = ("--bits", 4, "--epochs", 0, "--run-dir", run, "--no-export")
        answer("quantize", MODEL, *float_options(digits, digits / "few"), *quick, *options)

        found = answer("analyze", run, *data, "--flips")["instruments"]["flips"]

        assert found["reason"] is None
        assert 0 < found["share"] < 0.1

    def test_mismatched_latent_weights_are_ignored(
        self, run: Path, data: tuple[object, ...], tmp_path: Path, everything: dict[str, Any]
    ) -> None:
        import shutil

        other = tmp_path / "run"
        shutil.copytree(run, other, ignore=shutil.ignore_patterns("analysis"))
        file = CheckpointFile(other / "checkpoints" / "last.ckpt")
        state = file.load() or {}
        name = next(name for name in reversed(state["model"]) if name.endswith("conv2.weight"))
        state["model"][name] *= -1
        file.save(state)

        found = answer("analyze", other, *data, "--flips")

        assert "checkpoint" in found["instruments"]["flips"]["reason"]
        assert found["loss"] == everything["loss"]

    def test_float_model_is_calibrated_like_a_run(
        self, run: Path, digits: Path, tmp_path: Path, everything: dict[str, Any]
    ) -> None:
        options = ("--bits", 4, "--images", 40, "--sharpness", "--out", tmp_path, "--against", run)

        found = answer("analyze", MODEL, *float_options(digits, digits / "few"), *options)

        assert found["loss"] == everything["loss"] == found["against"]["loss"]
        mine, other = found["instruments"]["sharpness"], everything["instruments"]["sharpness"]
        assert mine["rho"] == other["rho"] == 0.9
        assert mine["sharpness"] == pytest.approx(other["sharpness"], rel=1e-5)

    def test_two_models_are_plotted_together(
        self, run: Path, data: tuple[object, ...], digits: Path, tmp_path: Path
    ) -> None:
        file = run / "artifacts" / "model.safetensors"
        options = ("--against", file, *SMALL, "--landscape", "--sensitivity", "--out", tmp_path)

        found = answer("analyze", run, *data, *options)

        assert found["against"]["instruments"]["landscape"] == found["instruments"]["landscape"]
        assert (tmp_path / "against" / "landscape.json").is_file()
        assert (tmp_path / "sensitivity_against.svg").is_file()
        before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*g")}
        answer("analyze", run, *data, *options, "--resume")  # redraws from the files
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*g")} == before

    def test_default_instruments_print_a_table(
        self, run: Path, data: tuple[object, ...], tmp_path: Path
    ) -> None:
        few = ("--iterations", 2, "--samples", 2)
        result = saq("analyze", run, *data, *few, "--out", tmp_path, "--quiet")

        assert result.exit_code == 0, result.stderr
        quick = {name for name, instrument in INSTRUMENTS.items() if instrument.quick}
        assert {path.stem for path in tmp_path.glob("*.json")} == quick
        assert "largest Hessian eigenvalue" in result.stdout
        assert "not converged" in result.stdout
        assert "top-1 on training images" in result.stdout
        assert "on 40 training images" in result.stdout
        assert result.stderr == ""

    def test_values_and_errors_have_equal_decimals(
        self, run: Path, data: tuple[object, ...], tmp_path: Path
    ) -> None:
        options = (*SMALL, "--trace", "--eigenvalue", "--split", "val", "--out", tmp_path, "--quiet")
        result = saq("analyze", run, *data, *options)

        (pair,) = (line for line in result.stdout.splitlines() if line.startswith("Hessian trace"))
        value, error = pair.removeprefix("Hessian trace").split(" ± ")
        assert len(value.partition(".")[2].strip()) == len(error.partition(".")[2].strip())
        assert "top-1 on validation images" in result.stdout


def test_model_without_finite_loss_is_refused(
    run: Path, data: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Score(top1=10.0, top5=50.0, loss=math.nan, images=40, skipped=0)
    monkeypatch.setattr(AnalysisInput, "score", lambda self: score)

    result = saq("analyze", run, *data, "--flips", "--out", tmp_path / "out", "--quiet")

    assert result.exit_code == 1
    assert "is NaN on 40 images" in last_error(result)
    assert not (tmp_path / "out").exists()


class TestResume:
    def test_interrupted_landscape_resumes(
        self, run: Path, data: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("analyze", run, *data, "--landscape", "--grid", 5)
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        answer(*command, "--out", whole)
        calls = 0
        score = AnalysisInput.score

        def interrupted(subject: AnalysisInput) -> Any:
            nonlocal calls
            calls += 1
            if calls == 9:
                signal.raise_signal(signal.SIGINT)
            return score(subject)

        monkeypatch.setattr(AnalysisInput, "score", interrupted)
        result = saq(*command, "--out", stopped, "--quiet")
        monkeypatch.setattr(AnalysisInput, "score", score)

        assert result.exit_code == 130
        resume = "Interrupted; progress saved. Resume with the same command and --resume"
        assert last_line(result) == resume
        partial = json.loads((stopped / "landscape.json").read_text())
        assert partial["finished"] is False
        assert partial["reading"]["done"] == 8
        assert sum(value is None for row in partial["reading"]["loss"] for value in row) == 25 - 8
        assert not list(stopped.glob("*.png"))

        calls = 0
        monkeypatch.setattr(AnalysisInput, "score", interrupted)  # counts; never reaches the ninth again
        calls = -100
        answer(*command, "--out", stopped, "--resume")

        assert calls == -100 + 1 + 25 - 8  # the evaluation at the start, and the points that were left
        for name in ("landscape.json", "landscape_contour.svg", "landscape_surface.png"):
            assert (stopped / name).read_bytes() == (whole / name).read_bytes()

    def test_existing_results_are_kept(
        self, run: Path, data: tuple[object, ...], everything: dict[str, Any]
    ) -> None:
        path = run / "analysis" / "trace.json"
        before = path.read_bytes()

        again = saq("analyze", run, *data, "--trace", "--quiet")
        other = saq("analyze", run, *data, "--trace", "--samples", 3, "--resume", "--quiet")
        fewer = saq(
            "analyze", run, *data[:2], "--images", 30, "--trace", "--samples", 2, "--resume", "--quiet"
        )

        assert [again.exit_code, other.exit_code, fewer.exit_code] == [1, 1, 1]
        assert "--overwrite" in last_error(again)
        assert "samples: 2 -> 3" in last_error(other)
        assert "other images" in last_error(fewer)
        assert path.read_bytes() == before

    def test_unknown_key_in_results_is_refused(
        self, run: Path, data: tuple[object, ...], tmp_path: Path
    ) -> None:
        command = ("analyze", run, *data, "--sharpness", "--out", tmp_path)
        answer(*command)
        path = tmp_path / "sharpness.json"
        tree = json.loads(path.read_text())
        tree["reading"]["surprise"] = 1
        path.write_text(json.dumps(tree))

        result = saq(*command, "--resume", "--quiet")
        replaced = saq(*command, "--overwrite", "--quiet")

        assert result.exit_code == 1
        assert "unknown key 'surprise'" in last_error(result)
        assert replaced.exit_code == 0
        assert "surprise" not in path.read_text()


@pytest.mark.parametrize(
    "losses",
    [[[None] * 3] * 3, [[0.0] * 3] * 3, [[None, 1e30, 2.0], [1.0, 0.0, 1.0], [None, 3.0, 1e-9]]],
    ids=["nothing", "flat", "steep"],
)
def test_every_landscape_can_be_plotted(losses: Any, tmp_path: Path) -> None:
    reading = LandscapeReading(grid=3, span=1.0, done=9, loss=losses, top1=losses, cosine=0.0)

    drawn = draw("landscape", [("a/b", reading), ("c/b", reading)], tmp_path)

    assert [path.name for path in drawn if path.stat().st_size > 1000] == [
        f"landscape_{kind}{suffix}" for kind in ("contour", "surface") for suffix in (".png", ".svg")
    ]


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "code", "says"),
        [
            (["saq/resnet20", "--no-pretrained", "--data", "x"], 1, "--bits 4"),
            (["model.onnx", "--data", "x"], 1, "ONNX"),
            (["nothing.safetensors", "--data", "x"], 1, "there is no file nothing.safetensors"),
            (["saq/resnet20", "--bits", "4", "--no-pretrained"], 1, "--data"),
            (["saq/resnet20", "--bits", "4", "--no-pretrained", "--data", "/no/such"], 1, "/no/such"),
            (["saq/resnet20", "--bits", "9", "--no-pretrained", "--data", "x"], 1, "2 to 8"),
            (["saq/resnet20", "--bits", "4", "--grid", "10", "--data", "x"], 1, "11"),
            (["saq/resnet20", "--bits", "4", "--grid", "1", "--data", "x"], 2, "3"),
            (["saq/resnet20", "--bits", "4", "--split", "all", "--data", "x"], 1, "no folder x"),
            (["saq/resnet20", "--bits", "4", "--rho", "-1", "--data", "x"], 1, "rho"),
            (["saq/resnet20", "--bits", "4", "--rho-unit", "feet", "--data", "x"], 1, "rho_unit"),
            (["saq/resnet20", "--bits", "4", "--candidates", "1,2", "--data", "x"], 1, "candidates"),
            (["saq/resnet20", "--bits", "4", "--against", "saq/resnet20", "--data", "x"], 1, "--against"),
            (["saq/resnet20", "--bits", "4", "--resume", "--overwrite", "--data", "x"], 1, "one of them"),
            ([], 1, "there is no run in runs/"),
            (["--bits", "4"], 1, "none was named"),
        ],
    )
    def test_errors_are_one_line_with_advice(
        self, arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)

        result = saq("analyze", *arguments, "--quiet")

        assert result.exit_code == code
        assert says in result.stderr
        if code == 1:
            assert says in last_error(result)
        assert list(tmp_path.iterdir()) == []

    def test_options_fixed_by_the_run_are_refused(self, run: Path, data: tuple[object, ...]) -> None:
        bits = saq("analyze", run, *data, "--bits", 4, "--quiet")
        size = saq("analyze", run, *data, "--input-size", 32, "--trace", "--overwrite", "--quiet")

        assert "--bits" in last_error(bits)
        assert "--input-size" in last_error(size)

    def test_images_of_other_classes_are_refused(self, run: Path, digits: Path, tmp_path: Path) -> None:
        for part in ("train", "val"):
            for label in range(10):
                folder = tmp_path / "images" / part / f"class{label}"
                folder.mkdir(parents=True)
                source = next((digits / "images" / "train" / str(label)).iterdir())
                (folder / source.name).write_bytes(source.read_bytes())

        result = saq("analyze", run, "--data", tmp_path / "images", "--out", tmp_path / "out", "--quiet")

        assert result.exit_code == 1
        assert "class" in last_error(result)
        assert not (tmp_path / "out").exists()


def test_unexportable_network_can_be_analyzed(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an export was tried")

    monkeypatch.setattr(calibration, "_try_export", refuse)
    options = ("--bits", 4, "--sharpness", "--images", 20, "--out", tmp_path / "out", "--quiet")
    result = saq("analyze", MODEL, *float_options(digits, digits / "few"), *options)
    assert result.exit_code == 0, result.stderr
