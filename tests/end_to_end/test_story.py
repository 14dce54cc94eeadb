"""The README example on real handwritten digits: quantize, evaluate, export, rerun.

The run is that of ``saq demo``.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import saqcli
from saqcli.cli import app
from saqcli.cli.demo import BUDGET
from saqcli.pipelines import demo
from saqcli.pipelines.demo import FLOAT_EPOCHS
from saqcli.quant.cost import BUDGET_USE
from saqcli.units import parse_quantity
from tests.support.digits import MODEL, float_options

QUICK = ("--set", "data.calibration_images=128", "--set", "data.verify_images=20")
UNIFORM_2 = 42_508_288  # BOPs of saq/resnet20 at 2 bits on 16 x 16 grey images
UNIFORM_3 = 92_640_256  # BOPs, just below what 3 bits cost saq/resnet20 on 16 x 16 grey images


def saq(*arguments: object) -> Any:
    """Run a command, which must succeed, and return its JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo writes the digits, the float network and a finished run."""
    return tmp_path_factory.mktemp("story") / "demo"


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A finished run under the cost of uniform 3 bits, given as a number."""
    return place / "quantized"


@pytest.fixture(scope="module")
def quantized(place: Path) -> dict[str, Any]:
    """The output of ``saq demo``, with fewer epochs of float training than by default."""
    return demonstrated(place, 3, "--bops", f"{UNIFORM_3 / 1e6:f}M")


def demonstrated(place: Path, float_epochs: int, *options: str) -> dict[str, Any]:
    """The output of ``saq demo``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "train_float", partial(demo.train_float, epochs=float_epochs))
        answer: dict[str, Any] = saq("demo", "--run-dir", place, "--epochs", 1, *options)
    return answer


def float_network(place: Path) -> list[str]:
    """Options that select the demo's weights and images."""
    return float_options(place, place / "digits")


def test_budget_is_met_and_used(quantized: dict[str, Any]) -> None:
    assert quantized["budget_bops"] == UNIFORM_3
    assert 0.985 * UNIFORM_3 <= quantized["bops"] <= UNIFORM_3
    assert quantized["bops_reduction"] == pytest.approx(quantized["float_bops"] / quantized["bops"])


def test_accuracy_is_within_3_points_of_float(quantized: dict[str, Any]) -> None:
    assert quantized["float_top1"] > 90
    assert quantized["top1"] > quantized["float_top1"] - 3


def test_run_directory_is_complete(quantized: dict[str, Any], run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())

    assert manifest["status"] == "finished"
    names = {"model.onnx", "model.safetensors", "model.verdict.json"}
    assert set(manifest["artifacts"]) == {f"artifacts/{name}" for name in names}
    assert all(
        (run / name).is_file() for name in ("config.json", "policy.json", "report.md", "metrics.jsonl")
    )
    assert json.loads((run / "policy.json").read_text())["layers"] == quantized["policy"]
    assert f"{quantized['top1']:.2f} %" in (run / "report.md").read_text()


def test_run_safetensors_and_onnx_agree(quantized: dict[str, Any], run: Path, place: Path) -> None:
    data = ("--data", place / "digits")
    scores = [
        saq("eval", target, *data)
        for target in (run, run / "artifacts" / "model.safetensors", run / "artifacts" / "model.onnx")
    ]

    assert scores[0]["top1"] == scores[1]["top1"] == quantized["top1"]
    assert scores[2]["top1"] == pytest.approx(quantized["top1"], abs=100 / quantized["images"])
    assert quantized["onnx_argmax_agreement"] >= 0.99


def test_policy_costs_match_profile(quantized: dict[str, Any], run: Path) -> None:
    options = ("--num-classes", 10, "--in-chans", 1, "--input-size", 16)

    assert saq("profile", MODEL, *options, "--policy", run / "policy.json")["bops"] == quantized["bops"]


def test_loaded_module_has_that_policy(quantized: dict[str, Any], run: Path) -> None:
    from saqcli.quant.convert import active_bits

    model = saqcli.load(run)

    found = active_bits(model, MODEL, quantized["policy"])
    assert found.model_dump()["layers"] == quantized["policy"]


def test_other_policy_changes_outputs_and_costs(
    quantized: dict[str, Any], run: Path, place: Path, tmp_path: Path
) -> None:
    policy = json.loads((run / "policy.json").read_text())
    for bits in list(policy["layers"].values())[1:-1]:
        bits["weight"] = bits["activation"] = 2
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))

    answer = saq(
        *("quantize", MODEL, *float_network(place), "--policy", path, "--epochs", 0, *QUICK),
        *("--no-export", "--run-dir", tmp_path / "two"),
    )
    images = torch.randn(4, 1, 16, 16)

    assert answer["bops"] < 0.6 * UNIFORM_3
    assert answer["top1"] == answer["calibrated_top1"]
    with torch.no_grad():
        assert not torch.equal(saqcli.load(run)(images), saqcli.load(tmp_path / "two")(images))


def test_run_config_is_complete(quantized: dict[str, Any], run: Path) -> None:
    planned = saq("quantize", "--config", run / "config.json", "--dry-run")

    assert planned["config"] == json.loads((run / "config.json").read_text())


@pytest.mark.slow  # in every run, `saq rerun` must give the same bits
def test_rerun_gives_the_same_metrics(quantized: dict[str, Any], run: Path, tmp_path: Path) -> None:
    again = saq("quantize", "--config", run / "config.json", "--run-dir", tmp_path / "again")

    assert (tmp_path / "again" / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    assert again["policy"] == quantized["policy"]


def test_finished_run_is_not_overwritten(quantized: dict[str, Any], run: Path, place: Path) -> None:
    before = (run / "artifacts" / "model.safetensors").read_bytes()

    result = CliRunner().invoke(
        app, ["quantize", MODEL, *float_network(place), "--bits", "4", "--run-dir", str(run)]
    )

    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert (run / "artifacts" / "model.safetensors").read_bytes() == before


def test_export_is_verified_and_not_overwritten(quantized: dict[str, Any], run: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"

    answer = saq("export", run, "--onnx", path)
    second = CliRunner().invoke(app, ["export", str(run), "--onnx", str(path)])

    assert answer["verified"] is True
    assert answer["size_bytes"] == path.stat().st_size
    assert second.exit_code == 1
    assert "--overwrite" in second.stderr


def test_export_takes_images_and_place_from_the_run(
    quantized: dict[str, Any], run: Path, place: Path
) -> None:
    written = run / "artifacts" / "model-qdq.onnx"
    try:
        answer = saq("export", place)  # which holds this run alone
        again = CliRunner().invoke(app, ["export", str(run)])
        evaluated = saq("eval", run)
    finally:
        written.unlink(missing_ok=True)
        written.with_name("model-qdq.verdict.json").unlink(missing_ok=True)

    assert (answer["onnx"], answer["verified_on"]) == (str(written), str(place / "digits"))
    assert answer["images"] == answer["images_available"] == evaluated["images"]
    assert evaluated["top1"] == quantized["top1"]
    assert f"{written} already exists: use --overwrite" in again.stderr


def test_failed_verification_exits_3_without_file(
    quantized: dict[str, Any], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saqcli import export
    from saqcli.export.qdq import QdqExporter
    from saqcli.quant.layer import quantized_layers

    class Broken(QdqExporter):
        def export(self, model: Any, example: Any, path: Path, facts: Any) -> None:
            for layer in quantized_layers(model).values():
                layer.latent_weight().data.neg_()
            super().export(model, example, path, facts)
            for layer in quantized_layers(model).values():
                layer.latent_weight().data.neg_()

    monkeypatch.setitem(export.STYLES, "qdq", Broken)

    result = CliRunner().invoke(app, ["export", str(run), "--onnx", str(tmp_path / "broken.onnx")])

    assert result.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def check_demonstrated(answer: dict[str, Any], float_top1: int) -> None:
    assert answer["float_top1"] > float_top1
    assert answer["top1"] > 90
    assert answer["bops"] <= answer["budget_bops"]


def test_demo_runs_offline(quantized: dict[str, Any]) -> None:
    check_demonstrated(quantized, 90)


def test_demo_budget_mixes_bits() -> None:
    """Above uniform 2 bits, and well below 3."""
    assert BUDGET_USE * parse_quantity(BUDGET) > UNIFORM_2
    assert parse_quantity(BUDGET) < UNIFORM_3


def test_demo_prints_the_bits(
    place: Path, quantized: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "demo", lambda *_, **__: quantized)
    result = CliRunner().invoke(app, ["demo", "--run-dir", str(place), "--quiet"])

    assert result.exit_code == 0, result.stderr
    assert re.search(r"mean bits, weighted by MACs: weights \d\.\d+, inputs \d\.\d+", result.stdout)
    for name, bits in quantized["policy"].items():
        assert re.search(
            rf"{re.escape(name)}[ (a-z)]* {'■' * bits['weight']} {bits['weight']} ", result.stdout
        )
    assert "x fewer BOPs than float" in result.stdout


@pytest.mark.slow
def test_full_demo_runs_offline(tmp_path: Path) -> None:
    answer = demonstrated(tmp_path / "demo", FLOAT_EPOCHS)
    check_demonstrated(answer, 95)
    assert {bits["weight"] for bits in answer["policy"].values()} >= {2, 3, 8}
