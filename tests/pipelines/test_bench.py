"""Benchmarks: timing with a fake clock, and real runs on tiny networks."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from typer.testing import CliRunner

from saqcli.cli import app
from saqcli.cli.screens.readings import SMALLER_NOT_FASTER, show_bench
from saqcli.config import ModelSection
from saqcli.errors import ConfigError, UnsupportedModel
from saqcli.export.qdq import QdqExporter
from saqcli.machine import cores, cpu_name
from saqcli.pipelines import bench
from saqcli.pipelines.bench import (
    BenchSettings,
    BenchTarget,
    Lineup,
    Timing,
    bench_source,
    measure,
    summarize,
    time_in_turns,
)
from saqcli.progress import SILENT
from saqcli.quant import convert
from saqcli.verify.runtime import Kernels, count_kernels, open_file, runner
from tests.support.digits import MODEL, float_options
from tests.support.tiny import build

FOUR = ["PyTorch float", "PyTorch fake-quant", "ONNX float", "ONNX quantized"]
QUICK = ("--bench", "--batch-sizes", "1,3", "--repeats", 2, "--threads", 1)
KEYS = {
    *("name", "runtime", "batch_size", "threads", "latency_ms", "spread_ms", "images_per_second", "relative"),
    *("integer_kernels", "float_kernels", "size_bytes"),
}


def saq(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    result = saq(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated run at 4 bits."""
    path = tmp_path_factory.mktemp("bench") / "run"
    options = ("--bits", 4, "--epochs", 0, "--set", "data.verify_images=20", "--run-dir", path)
    answer("quantize", MODEL, *float_options(digits, digits / "few"), *options)
    return path


class TestTimingRounds:
    def test_directions_alternate_after_warm_up(self) -> None:
        calls: list[str] = []
        task = CountingTask()
        time_in_turns({name: partial(calls.append, name) for name in "abc"}, 3, task)

        warm_up = [name for name in "abc" for _ in range(bench.WARM_UP)]
        rounds = [name for order in ("abc", "cba", "abc") for name in order for _ in range(2)]
        assert calls == warm_up + rounds
        assert task.steps == 3

    def test_only_second_calls_are_timed(self) -> None:
        clock = Clock()
        calls = 0

        def run() -> None:
            nonlocal calls
            calls += 1
            timed = calls > bench.WARM_UP and (calls - bench.WARM_UP) % 2 == 0
            clock.now += 1.0 if timed else 100.0

        assert time_in_turns({"a": run}, 5, CountingTask(), clock) == {"a": Timing(1.0, 0.0, 5)}

    def test_targets_are_timed_separately(self) -> None:
        clock = Clock()
        found = time_in_turns(
            {"slow": partial(clock.wait, 3.0), "fast": partial(clock.wait, 0.5)}, 4, CountingTask(), clock
        )

        assert found == {"slow": Timing(3.0, 0.0, 4), "fast": Timing(0.5, 0.0, 4)}

    @pytest.mark.parametrize(
        ("seconds", "median", "spread"),
        [([7.0], 7.0, 0.0), ([1.0, 3.0], 2.0, 1.0), ([5.0, 1.0, 2.0, 4.0, 1000.0], 4.0, 3.0)],
    )
    def test_timings_give_median_and_quartiles(
        self, seconds: list[float], median: float, spread: float
    ) -> None:
        assert summarize(seconds) == Timing(median, spread, len(seconds))


class CountingTask:
    """A task that counts its calls."""

    steps = 0

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        self.steps += steps


class Clock:
    """A clock that the test advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class TestMeasuring:
    def test_rows_use_medians(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given = {"PyTorch float": Timing(0.04, 0.004, 9), "ONNX float": Timing(0.02, 0.001, 9)}
        monkeypatch.setattr(bench, "time_in_turns", lambda runs, rounds, task: given)
        found = measure(lineup("PyTorch float", "ONNX float"), BenchSettings((8,), (1,)), SILENT)

        assert found.baseline == "ONNX float"
        assert [row.latency_ms for row in found.rows] == pytest.approx([40, 20])
        assert [row.spread_ms for row in found.rows] == pytest.approx([4, 1])
        assert [row.images_per_second for row in found.rows] == pytest.approx([200, 400])
        assert [row.relative for row in found.rows] == pytest.approx([0.5, 1.0])

    def test_baseline_without_onnx_is_pytorch(self) -> None:
        found = measure(lineup("PyTorch float"), BenchSettings((1,), (1,), 1), SILENT)

        assert found.baseline == "PyTorch float"
        assert found.rows[0].relative == 1.0

    def test_cases_set_and_restore_threads(self) -> None:
        seen: list[tuple[int, int, bool]] = []
        line = lineup("PyTorch float")
        line.targets[0] = BenchTarget(
            "PyTorch float",
            "PyTorch",
            0,
            lambda threads: lambda x: seen.append((len(x), torch.get_num_threads(), x.requires_grad)) or x,
        )
        before = torch.get_num_threads()
        threads = tuple(range(1, min(cores(), 2) + 1))
        measure(line, BenchSettings((1, 3), threads, 1), SILENT)

        assert torch.get_num_threads() == before
        cases = list(dict.fromkeys(seen))
        assert cases == [(size, count, False) for count in threads for size in (1, 3)]

    def test_threads_are_restored_after_errors(self) -> None:
        def fail(threads: int) -> Any:
            raise RuntimeError("no")

        line = lineup("PyTorch float")
        line.targets[0] = BenchTarget("PyTorch float", "PyTorch", 0, fail)
        before = torch.get_num_threads()
        with pytest.raises(RuntimeError, match="no"):
            measure(line, BenchSettings((1,), (cores(),)), SILENT)

        assert torch.get_num_threads() == before

    def test_images_are_deterministic(self) -> None:
        assert torch.equal(bench.random_images(2, (3, 4, 4)), bench.random_images(2, (3, 4, 4)))
        assert bench.random_images(2, (3, 4, 5)).shape == (2, 3, 4, 5)

    def test_machine_name_and_cores(self) -> None:
        assert cpu_name().strip()
        assert cores() >= 1


def lineup(*names: str) -> Lineup:
    """Targets that do nothing."""
    return Lineup(
        "tiny", (3, 4, 4), targets=[BenchTarget(name, "any", 10, lambda n: lambda x: x) for name in names]
    )


@pytest.fixture(scope="module")
def measured(run: Path) -> dict[str, Any]:
    """The command's output for the run."""
    found: dict[str, Any] = answer("eval", run, *QUICK)
    return found


class TestTargets:
    def test_run_is_measured_in_four_forms(self, run: Path, measured: dict[str, Any]) -> None:
        found = measured
        rows = found["bench"]["rows"]

        assert found["target"] == str(run)
        assert [found[key] for key in ("top1", "top5", "loss", "images", "images_per_second")] == [None] * 5
        assert [(row["name"], row["batch_size"]) for row in rows] == [(n, b) for b in (1, 3) for n in FOUR]
        for row in rows:
            assert set(row) == KEYS
            figures = (row["latency_ms"], row["images_per_second"], row["relative"], row["size_bytes"])
            assert all(math.isfinite(figure) and figure > 0 for figure in figures)
            assert row["spread_ms"] >= 0
            assert row["images_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["latency_ms"])
            assert (row["integer_kernels"] is None) == (row["runtime"] == "PyTorch")
            assert row["threads"] == 1
        assert [row["relative"] for row in rows if row["name"] == "ONNX float"] == [1.0, 1.0]
        sizes = {row["name"]: row["size_bytes"] for row in rows}
        assert sizes["ONNX quantized"] == (run / "artifacts" / "model.onnx").stat().st_size
        assert sizes["PyTorch fake-quant"] == (run / "artifacts" / "model.safetensors").stat().st_size
        assert sizes["ONNX quantized"] < sizes["ONNX float"]
        layers = {row["name"]: (row["integer_kernels"], row["float_kernels"]) for row in rows}
        assert layers["ONNX float"] == (0, 20)  # 19 convolutions and the classifier

    def test_conditions_are_reported(self, measured: dict[str, Any]) -> None:
        found = measured["bench"]

        assert {"saq", "torch", "onnxruntime"} <= set(found["versions"])
        assert found["cpu"] == {"name": cpu_name(), "cores": cores()}
        assert (found["batch_sizes"], found["threads"], found["repeats"]) == ([1, 3], [1], 2)
        assert (found["model"], found["input_size"], found["few_bits"]) == (MODEL, [1, 16, 16], True)
        assert (found["baseline"], found["notes"]) == ("ONNX float", [])

    def test_safetensors_is_exported_first(self, run: Path) -> None:
        found = answer("eval", run / "artifacts" / "model.safetensors", *QUICK)["bench"]

        assert [row["name"] for row in found["rows"][:4]] == FOUR
        assert "style qdq" in found["notes"][0]

    def test_onnx_file_includes_float_architecture(self, run: Path) -> None:
        found = answer("eval", run / "artifacts" / "model.onnx", *QUICK)["bench"]

        assert [row["name"] for row in found["rows"][:3]] == [n for n in FOUR if "fake" not in n]
        assert found["notes"] == ["no PyTorch fake-quant: an ONNX file holds no PyTorch model"]
        assert found["few_bits"]

    def test_float_model_has_no_quantized_rows(self) -> None:
        options = ("--no-pretrained", "--num-classes", 10, "--input-size", 16)
        found = answer("eval", MODEL, *options, *QUICK)["bench"]

        assert [row["name"] for row in found["rows"][:2]] == ["PyTorch float", "ONNX float"]
        assert "no quantized rows" in found["notes"][0]
        assert not found["few_bits"]

    def test_accuracy_is_measured_with_data(self, run: Path, digits: Path) -> None:
        data = ("--data", digits / "few")
        plain = answer("eval", run, *data)
        both = answer("eval", run, *data, *QUICK)

        assert plain["bench"] is None
        assert both["top1"] == plain["top1"] > 0
        assert len(both["bench"]["rows"]) == 8

    def test_all_artifacts_of_a_run_are_measured(self, run: Path, tmp_path: Path) -> None:
        copied = tmp_path / "run"
        shutil.copytree(run, copied)
        shutil.copy(copied / "artifacts" / "model.onnx", copied / "artifacts" / "float.onnx")
        manifest = json.loads((copied / "manifest.json").read_text())
        manifest["artifacts"]["artifacts/float.onnx"] = ""
        (copied / "manifest.json").write_text(json.dumps(manifest))
        found = answer("eval", copied, *QUICK)["bench"]

        names = [row["name"] for row in found["rows"][:5]]
        assert names == [*FOUR[:3], "ONNX model.onnx", "ONNX float.onnx"]

        (copied / "artifacts" / "float.onnx").unlink()
        gone = saq("eval", copied, *QUICK)
        assert gone.exit_code == 1
        assert "float.onnx is missing" in gone.stderr

    @pytest.mark.parametrize("name", ["attention", "residual", "tokens"])
    def test_float_pytorch_and_onnx_agree(self, name: str, tmp_path: Path) -> None:
        net, x = build(name)
        convert.wrap(net)
        convert.unwrap(net)
        line = Lineup("tiny", tuple(x.shape[1:]))
        bench._add_float(line, net, {}, tmp_path)

        assert [one.name for one in line.targets] == ["PyTorch float", "ONNX float"]
        assert torch.backends.mha.get_fastpath_enabled()
        with torch.inference_mode():
            torch.testing.assert_close(line.targets[1].open(1)(x), net(x), atol=1e-4, rtol=1e-4)

    def test_unexportable_model_is_skipped(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: object) -> None:
            raise UnsupportedModel("the model cannot be exported to ONNX: no")

        monkeypatch.setattr(QdqExporter, "export", refuse)
        section = ModelSection(name=str(run / "artifacts" / "model.safetensors"))
        found = bench_source(section.name, section, BenchSettings((1,), (1,), 1), SILENT)

        assert [row.name for row in found.rows] == FOUR[:2]
        assert found.baseline == "PyTorch float"
        assert [note for note in found.notes if note.endswith("to ONNX: no")]


class TestOnnxFiles:
    def test_operators_in_subgraphs_are_counted(self) -> None:
        def nodes(*types: str) -> list[onnx.NodeProto]:
            return [helper.make_node(kind, ["x"], ["y"]) for kind in types]

        inner = helper.make_graph(nodes("QLinearConv", "Gemm"), "inner", [], [])
        condition = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
        graph = helper.make_graph(
            [
                *nodes("Conv", "FusedConv", "QGemm", "MatMulIntegerToFloat", "Relu", "QuantizeLinear"),
                condition,
            ],
            "graph",
            [],
            [],
        )

        assert count_kernels(graph) == Kernels(integer=4, floating=4)

    def test_integer_kernels_are_detected(self, tmp_path: Path) -> None:
        """The file holds no QLinearConv; ONNX Runtime fuses Q and DQ around a convolution into one."""
        path = tmp_path / "model.onnx"
        onnx.save(quantized_convolution(), path)

        assert open_file(path).kernels == Kernels(integer=1, floating=0)
        assert runner(path, 1)(torch.zeros(2, 1, 4, 4)).shape == (2, 1, 4, 4)

    def test_fixed_batch_size_is_refused_up_front(self, run: Path, tmp_path: Path) -> None:
        model = onnx.load(run / "artifacts" / "model.onnx")
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 3
        del model.graph.value_info[:]
        path = tmp_path / "fixed.onnx"
        onnx.save(model, path)
        refused = saq("eval", path, *QUICK)

        assert refused.exit_code == 1
        assert "batches of 3 only: use --batch-sizes 3" in refused.stderr
        found = answer("eval", path, "--bench", "--batch-sizes", 3, "--repeats", 1, "--threads", 1)
        assert found["bench"]["rows"][-1]["batch_size"] == 3


def quantized_convolution() -> onnx.ModelProto:
    """Q, DQ, a convolution with a dequantized weight, Q, DQ."""

    def constant(name: str, kind: int, shape: tuple[int, ...], value: float) -> onnx.TensorProto:
        return helper.make_tensor(name, kind, shape, [value] * math.prod(shape))

    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["dw"]),
        helper.make_node("Conv", ["d", "dw"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["qc"]),
        helper.make_node("DequantizeLinear", ["qc", "s", "z"], ["logits"]),
    ]
    shape = ["batch", 1, 4, 4]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [
            constant("s", TensorProto.FLOAT, (), 0.1),
            constant("z", TensorProto.UINT8, (), 0),
            constant("wz", TensorProto.INT8, (), 0),
            constant("w", TensorProto.INT8, (1, 1, 3, 3), 5),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--bench", "--batch-sizes", "0"], 1, "--batch-sizes 0: give whole numbers of at least 1"),
        (["--bench", "--batch-sizes", "1,x"], 1, "--batch-sizes 1,x: give whole numbers"),
        (["--bench", "--batch-sizes", ""], 1, "--batch-sizes '': give whole numbers"),
        (["--bench", "--batch-sizes", "1.5"], 1, "whole numbers"),
        (["--bench", "--batch-sizes", "70000"], 1, "from 1 to 65536"),
        (["--bench", "--threads", "-1"], 1, "--threads -1: give whole numbers"),
        (["--bench", "--threads", "100000"], 1, "this machine has"),
        (["--bench", "--repeats", "0"], 2, "--repeats"),
        (["--batch-sizes", "1"], 1, "requires --bench"),
        (["--threads", "1"], 1, "requires --bench"),
        (["--repeats", "3"], 1, "requires --bench"),
        (["--bench", "--batch-size", "8"], 1, "use --batch-sizes"),
        (["--bench", "--device", "cuda"], 1, "runs on the CPU"),
    ],
)
def test_invalid_input_is_one_line_error(options: list[str], code: int, says: str) -> None:
    result = saq("eval", "saq/resnet20", "--no-pretrained", *options)

    assert result.exit_code == code
    assert says in " ".join(result.stderr.split())
    assert not result.stdout


@pytest.mark.parametrize(("target", "says"), [("gone.onnx", "no file"), ("gone.safetensors", "no file")])
def test_missing_target_is_one_line_error(target: str, says: str) -> None:
    result = saq("eval", target, "--bench")

    assert result.exit_code == 1
    assert says in result.stderr


def test_settings_are_validated_in_python_too() -> None:
    for settings in (BenchSettings((0,)), BenchSettings(threads=(0,)), BenchSettings(repeats=0)):
        with pytest.raises(ConfigError):
            settings.check()


class TestTables:
    @pytest.fixture
    def shown(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., str]:
        monkeypatch.setenv("COLUMNS", "80")

        def show(**changes: Any) -> str:
            show_bench(sample() | changes)
            return capsys.readouterr().out

        return show

    def test_fits_80_columns(self, shown: Callable[..., str]) -> None:
        text = shown(few_bits=False)
        tables = text.split("Medians of")[0].splitlines()[1:]

        assert max(len(line.rstrip()) for line in tables) <= 80
        assert "…" not in text
        assert "123456.78" in text
        for name in FOUR:
            assert sum(line.startswith(name) for line in tables) == 3

    def test_explains_low_bits_only_where_present(self, shown: Callable[..., str]) -> None:
        assert SMALLER_NOT_FASTER in shown(few_bits=True)
        assert SMALLER_NOT_FASTER not in shown(few_bits=False)

    def test_explains_missing_rows(self, shown: Callable[..., str]) -> None:
        assert "No ONNX float: why [not]." in shown(notes=["no ONNX float: why [not]"])

    def test_printed_by_the_command(self, run: Path) -> None:
        result = saq("eval", run, *QUICK)

        assert result.exit_code == 0
        assert "images/s" in result.stdout
        assert "top-1" not in result.stdout
        assert result.stdout.rstrip().endswith(SMALLER_NOT_FASTER)


def sample() -> dict[str, Any]:
    """A possible ``--json`` output with wide figures."""
    rows = [
        {
            "name": name,
            "runtime": name.split()[0],
            "batch_size": size,
            "threads": 128,
            "latency_ms": 123456.78 if size > 1 else 1.23,
            "spread_ms": 1234.5,
            "images_per_second": 65536 / 123.45678,
            "relative": 100.25,
            "integer_kernels": None if "Py" in name else 1234,
            "float_kernels": None if "Py" in name else 1234,
            "size_bytes": 1_234_567_890,
        }
        for size in (1, 65536)
        for name in FOUR
    ]
    return {
        "model": "timm/some_network.of_some_weights",
        "input_size": [3, 224, 224],
        "cpu": {"name": "CPU", "cores": 128},
        "rows": rows,
        "repeats": 20,
        "baseline": "ONNX float",
        "notes": [],
        "few_bits": False,
    }
