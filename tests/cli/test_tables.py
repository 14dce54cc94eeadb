"""Tables on the screen: complete names at every width, singular and plural, remaining time."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from saqcli.cli import console
from saqcli.cli.screens.readings import show_analysis, show_bench
from saqcli.cli.screens.tables import show_evaluation, show_profile
from saqcli.units import counted, format_duration, format_figure
from tests.support.command_line import answer, saq
from tests.support.digits import MODEL, float_options

LONG = "stages.3.blocks.11.some_very_long_attention_name.token_mixer.projection.convolution"
Printed = pytest.CaptureFixture[str]


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", "80")
    return 80


def layer(name: str, group: str | None = None, *, pinned: bool = False) -> dict[str, Any]:
    costs = {"macs": 118_000_000, "weight_bits": 4, "activation_bits": None, "bops": 1_234_000_000}
    return {"name": name, "kind": "ScaledStdConv2dSame", "group": group or name, "pinned": pinned, **costs}


def profile(layers: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    costs = ("macs", "bops", "float_bops", "floor_bops", "ceiling_bops", "size_bytes", "float_size_bytes")
    return {
        "model": "timm/any",
        "input_size": [3, 8, 8],
        "num_classes": 1,
        "layers": layers,
        "products": [],
        "unquantized": [],
        **dict.fromkeys(costs, 2_000_000_000),
        **more,
    }


def test_profile_names_fit_80_columns(columns: int, capsys: Printed) -> None:
    product = {"name": f"{LONG}.product", "follows": LONG, "macs": 5, "bits": 4, "bops": 80}
    layers = [layer("conv1", pinned=True), layer(LONG), layer("layer1.0.conv2", LONG)]
    show_profile(profile(layers, products=[product]))
    lines = capsys.readouterr().out.splitlines()

    assert lines[0] == "timm/any, input 3x8x8, 1 class"
    assert "…" not in "\n".join(lines)
    for name in ("conv1 (pinned)", LONG, f"layer1.0.conv2 (same bits as {LONG})", f"{LONG}.product"):
        assert [line for line in lines if line.startswith(name)], name
    numbers = [line for line in lines if "ScaledStdConv2dSame" in line]
    assert len(numbers) == 3
    assert all(line.split()[-4:] == ["1.234", "G", "61.7", "%"] for line in numbers)
    assert max(map(len, numbers)) <= columns


@pytest.mark.parametrize("width", [60, 80, 200])
def test_command_prints_complete_names(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = saq("profile", "saq/preresnet20", "--bits", 4).stdout
    names = [each["name"] for each in answer("profile", "saq/preresnet20", "--bits", 4)["layers"]]

    words = text.split()
    assert [name for name in names if words.count(name) == 0] == []
    assert max(map(len, text.splitlines()[1:25])) <= width


def test_float_operations_are_counted(capsys: Printed) -> None:
    left = [{"name": f"norm{i}", "reason": "not a convolution"} for i in range(4)]
    show_profile(profile([layer("conv")], unquantized=[*left, {"name": "fft", "reason": "no weight"}]))
    lines = capsys.readouterr().out.splitlines()

    assert "4 operations stay in floating point: norm0, norm1, norm2 and 1 more; not a convolution" in lines
    assert "1 operation stays in floating point: fft; no weight" in lines


def test_bench_names_fit_80_columns(columns: int, capsys: Printed) -> None:
    names = ("PyTorch float", f"ONNX {LONG}.onnx")
    row = {
        "batch_size": 1,
        "threads": 1,
        "latency_ms": 1.5,
        "spread_ms": 0.25,
        "images_per_second": 666.7,
        "relative": 1.0,
        "size_bytes": 1000,
        "integer_kernels": 3,
        "float_kernels": None,
    }
    show_bench(
        {
            "model": "saq/resnet20",
            "input_size": [3, 32, 32],
            "cpu": {"name": "a processor"},
            "rows": [{"name": name, **row, "batch_size": batch} for batch in (1, 8) for name in names],
            "repeats": 1,
            "baseline": names[0],
            "notes": [],
            "few_bits": False,
        }
    )
    lines = capsys.readouterr().out.splitlines()

    assert lines.count(names[1]) == 3
    assert "8        1      1.50    0.25       667      1.00" in "\n".join(lines)
    assert "Medians of 1 run (interleaved); spread is the interquartile range." in lines


def analysis(target: str, **more: Any) -> dict[str, Any]:
    return {
        "target": target,
        "model": "saq/resnet20",
        "images": 1,
        "split": "train",
        "loss": None,
        "top1": 50.0,
        "instruments": {},
        "against": None,
        "files": ["out/sharpness.json"],
        "page": None,
        "out": "out",
        **more,
    }


def test_analysis_names_fit_80_columns(columns: int, capsys: Printed) -> None:
    targets = [f"runs/{'a' * 50}", f"runs/{'b' * 50}"]
    show_analysis(analysis(targets[0], against=analysis(targets[1])))
    text = capsys.readouterr().out

    assert [line[:3] for line in text.splitlines()].count("A: ") == 1
    assert f"A: {'a' * 50}\nB: {'b' * 50}\n" in text
    assert "on 1 " in text.splitlines()[0]
    assert "images" not in text.splitlines()[0]
    assert "None" not in text
    assert "nan" not in text
    assert "wrote 1 reading (JSON) to out" in text


def test_image_count_of_one_is_singular(capsys: Printed) -> None:
    result = {"top1": 100.0, "top5": 100.0, "loss": 0.5, "images_per_second": 3.0}
    show_evaluation({**result, "images": 1, "skipped": 1})
    show_evaluation({**result, "images": 8000, "skipped": 0})
    first, second = capsys.readouterr().out.splitlines()

    assert first.endswith("on 1 image (3 images/s), 1 unreadable image skipped")
    assert second.endswith("on 8,000 images (3 images/s)")


@pytest.mark.parametrize(
    ("number", "thing", "text"),
    [
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
        (0, "process", "0 processes"),
        (3, "epoch", "3 epochs"),
    ],
)
def test_counts_of_one_are_singular(number: int, thing: str, text: str) -> None:
    assert counted(number, thing) == text


def test_nan_is_written_as_text() -> None:
    assert format_figure(float("inf")) == format_figure(float("nan"), ".2f", " %") == "not finite"
    assert format_figure(None) == "-"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, set by the test."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


class TestRemainingTime:
    def test_excludes_the_first_step(self, clock: list[float]) -> None:
        """It may compile the network for a minute."""
        pace = console.Pace(10)
        pace.advance(0, 0)
        clock[0] += 62.0
        pace.advance(1, 32)
        assert pace.texts == []
        clock[0] += 3.0
        pace.advance(1, 32)

        assert pace.seconds_left == 3.0 * 8
        assert pace.texts == ["11 images/s", "24 s left"]

    def test_excludes_steps_before_resume(self, clock: list[float]) -> None:
        """80 of 100 steps ran before; skipping their images takes a minute, a step 2 s."""
        pace = console.Pace(100)
        pace.advance(80, 0)
        clock[0] += 62.0
        pace.advance(1, 32)
        assert pace.seconds_left is None
        for _ in range(4):
            clock[0] += 2.0
            pace.advance(1, 32)

        assert pace.done == 85
        assert pace.seconds_left == 2.0 * 15
        assert pace.texts == ["16 images/s", "30 s left"]

    def test_works_without_image_counts(self, clock: list[float]) -> None:
        pace = console.Pace(4)
        for _ in range(2):
            clock[0] += 60.0
            pace.advance(1, 0)

        assert pace.texts == ["2:00 left"]

    def test_log_and_progress_bar_agree(
        self, clock: list[float], capsys: Printed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: dict[str, Any] = {}

        class Bar:
            def update(self, _: object, **fields: Any) -> None:
                told.update(fields)

        tasks = [console._PlainTask("epoch 1 of 1", 50), console._LiveTask(Bar(), 0, 50)]
        for task in tasks:
            task.advance(40)
        for _ in range(3):
            clock[0] += 20.0
            for task in tasks:
                task.advance(images=10, loss=float("nan"))

        assert capsys.readouterr().err.splitlines()[-1] == (
            "epoch 1 of 1: 43/50, loss not finite, 0.5 images/s, 2:20 left"
        )
        assert told["pace"] == "0.5 images/s, 2:20 left"

    def test_formats_hours(self) -> None:
        assert [format_duration(s) for s in (0.4, 59.6, 3600)] == ["0 s", "1:00", "1:00:00"]


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated run without fine-tuning; its output is stored beside it."""
    path = tmp_path_factory.mktemp("one") / "my run"
    options = [*float_options(digits, digits / "few"), "--bits", "w4a5", "--epochs", 0, "--quiet"]
    result = saq("quantize", MODEL, *options, "--set", "data.verify_images=1", "--run-dir", path)
    assert result.exit_code == 0, result.stderr
    path.with_suffix(".txt").write_text(result.stdout)
    return path


class TestCalibratedRun:
    def test_omits_fine_tuning_columns(self, run: Path) -> None:
        report, shown = (run / "report.md").read_text(), run.with_suffix(".txt").read_text()

        assert report.splitlines()[2] == "|  | float | calibrated |"
        assert shown.splitlines()[1].split() == ["float", "calibrated"]
        assert "fine-tuned |" not in report
        assert "quantized" not in shown.splitlines()[1]
        top1 = json.loads((run / "manifest.json").read_text())["results"]["calibrated_top1"]
        assert f"{top1:.2f} % |" in report.splitlines()[4]

    def test_uses_singular_for_one_image(self, run: Path) -> None:
        assert "% of 1 image" in (run / "report.md").read_text()
        assert "on 100.00 % of 1 image" in run.with_suffix(".txt").read_text()
        said = (run / "report.md").read_text() + run.with_suffix(".txt").read_text()
        assert not re.search(r"\b1 images", said)

    def test_prints_the_rerun_command(self, run: Path) -> None:
        report = (run / "report.md").read_text()
        command = next(line for line in report.splitlines() if line.startswith("`saq rerun"))

        assert shlex.split(command.strip("`.")) == ["saq", "rerun", str(run)]

    def test_has_a_profile(self, run: Path) -> None:
        expected = answer(
            *("profile", MODEL, "--num-classes", 10, "--in-chans", 1, "--input-size", 16, "--bits", "w4a5")
        )
        for target in (run, run / "artifacts" / "model.safetensors", run / "artifacts" / "model.onnx"):
            assert answer("profile", target) == expected

    def test_reports_its_bits(self, run: Path) -> None:
        for option, value in (("--bits", 4), ("--policy", run / "policy.json")):
            result = saq("profile", run, option, value)
            assert result.exit_code == 1
            assert f"remove {option}" in result.stderr

    def test_profile_works_without_a_model(self, run: Path, tmp_path: Path) -> None:
        """As for a search or an interrupted run."""
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / "artifacts" / "model.safetensors").unlink()

        assert answer("profile", tmp_path / "run") == answer("profile", run)

        (tmp_path / "run" / "policy.json").unlink()
        result = saq("profile", tmp_path / "run")
        assert result.exit_code == 1
        assert "has no bits yet" in result.stderr
