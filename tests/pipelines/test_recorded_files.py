"""Files of targets and tables of costs: a run holds what they said when it started, and never reads them again."""

import json
from pathlib import Path
from typing import Any

import pytest

from saqcli.config import resolve
from saqcli.errors import ConfigError
from saqcli.runs.resume import first_difference
from saqcli.serialization import json_text
from saqcli.target import PAPER, target_of
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options

CHIP = 'description = "a chip"\nstyles = ["qonnx"]\njunctions = ["add", "pool"]\ncount_junctions = true\n'


def chip(folder: Path, text: str = CHIP) -> Path:
    file = folder / "chip.toml"
    file.write_text(text)
    return file


def table(folder: Path, layers: list[str], cost: float = 2.0) -> Path:
    file = folder / "costs.json"
    costs = {name: {"w8a8": cost, "w4a8": 1.0} for name in layers}
    file.write_text(json_text({"schema_version": 1, "unit": "ms", "layers": costs}))
    return file


def options(digits: Path, *more: object) -> tuple[object, ...]:
    return (MODEL, *float_options(digits, digits / "few"), "--batch-size", 32, "--workers", 0, *more)


def section(**named: object) -> Any:
    return resolve(options={"model.name": "x", **{f"quantization.{k}": str(v) for k, v in named.items()}})


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantization for a target of one's own, whose file is gone."""
    folder = tmp_path_factory.mktemp("recorded")
    bits = ("--bits", "8", "--epochs", 0, "--target", chip(folder))
    answer("quantize", *options(digits, *bits), "--run-dir", folder / "run")
    (folder / "chip.toml").unlink()
    return folder / "run"


@pytest.fixture(scope="module")
def layers(run: Path) -> list[str]:
    return list(json.loads((run / "policy.json").read_text())["layers"])


def test_settings_hold_the_content_of_files_only(tmp_path: Path) -> None:
    found = section(target=chip(tmp_path), cost=table(tmp_path, ["a"])).quantization
    assert found.contents["target"]["junctions"] == ["add", "pool"]
    assert found.contents["cost"]["layers"] == {"a": {"w8a8": 2.0, "w4a8": 1.0}}
    assert target_of(found).count_junctions
    named = section(target="qonnx")
    assert not named.quantization.contents
    assert "contents" not in named.to_json()
    assert target_of(section(target=PAPER).quantization).name == PAPER


def test_a_configuration_file_is_complete(tmp_path: Path) -> None:
    before, file = section(target=chip(tmp_path)), tmp_path / "config.json"
    file.write_text(before.to_json())
    chip(tmp_path, CHIP.replace("qonnx", "qdq"))
    again = resolve(file=file)
    assert again == before
    anew = resolve(file=file, options={"quantization.target": str(tmp_path / "chip.toml")})
    assert target_of(anew.quantization).styles == ("qdq",)
    assert anew.export.styles == ("qonnx",)  # which the file gives
    other = resolve(file=file, options={"quantization.target": "openvino"})
    assert not other.quantization.contents
    (tmp_path / "chip.toml").unlink()
    assert resolve(file=file) == before


def test_a_target_brings_its_table_of_costs(tmp_path: Path) -> None:
    costs, file = table(tmp_path, ["a"]), tmp_path / "config.json"
    named = chip(tmp_path, f'{CHIP}[settings.quantization]\ncost = "{costs}"\n')
    found = section(target=named)
    assert found.quantization.cost == str(costs)
    assert found.quantization.contents["cost"]["layers"] == {"a": {"w8a8": 2.0, "w4a8": 1.0}}
    plain = section(target=named, cost="bops")
    assert (plain.quantization.cost, set(plain.quantization.contents)) == ("bops", {"target"})
    costs.unlink()
    for before in (found, plain):
        file.write_text(before.to_json())
        assert resolve(file=file) == before
    with pytest.raises(ConfigError, match=r"costs\.json. cannot be read"):
        section(target=named)


@pytest.mark.parametrize(
    ("content", "words"),
    [(5, "contents.target"), ({"junctions": ["none"]}, "recorded content of chip.toml: junctions")],
)
def test_damaged_content_is_refused(tmp_path: Path, content: object, words: str) -> None:
    file = tmp_path / "config.json"
    given = {"target": "chip.toml", "contents": {"target": content}}
    file.write_text(json.dumps({"model": {"name": "x"}, "quantization": given}))
    with pytest.raises(ConfigError, match=words):
        resolve(file=file)


def test_missing_files_are_one_clear_line(tmp_path: Path) -> None:
    for option in ("--target", "--cost"):
        name = tmp_path / ("gone.toml" if option == "--target" else "gone.json")
        error = last_error(saq("search", "saq/resnet20", "--no-pretrained", option, name, "--budget", "w4a4"))
        assert f"{option} {name} cannot be read: No such file" in error


def test_edited_files_are_named(tmp_path: Path) -> None:
    old = section(target=chip(tmp_path), cost=table(tmp_path, ["a"]))
    new = section(target=chip(tmp_path), cost=table(tmp_path, ["a"], 3.0))
    assert f"{tmp_path}/costs.json was edited since; remove `quantization.cost`" in str(
        first_difference(old, new)
    )


def test_resume_refuses_an_edited_file(run: Path, digits: Path, tmp_path: Path) -> None:
    answer("quantize", "--resume", "--run-dir", run)
    edited = chip(run.parent, CHIP.replace("true", "false"))
    again = ("--bits", "8", "--epochs", 0, "--target", edited, "--resume", "--run-dir", run)
    assert f"{edited} was edited since; remove --target to use what the run recorded" in last_error(
        saq("quantize", *options(digits, *again))
    )
    edited.unlink()


def test_export_has_the_style_of_the_recorded_target(run: Path, tmp_path: Path) -> None:
    assert answer("export", run, "--onnx", tmp_path / "net.onnx")["style"] == "qonnx"
    assert "style qonnx, not qdq" in last_error(
        saq("export", run, "--onnx", tmp_path / "other.onnx", "--style", "qdq")
    )
    report = (run / "report.md").read_text()
    assert "Target chip, files of style qonnx; also quantized: add, pool at 8 bits, counted" in report


def test_rerun_needs_no_file(run: Path, tmp_path: Path) -> None:
    assert not (run.parent / "chip.toml").exists()
    assert answer("rerun", run, "--run-dir", tmp_path / "again")["identical"]


def test_profile_counts_what_the_run_counted(run: Path) -> None:
    made = json.loads((run / "manifest.json").read_text())["results"]
    for source in (run, run / "artifacts" / "model.safetensors", run / "artifacts" / "model.onnx"):
        found = answer("profile", source)
        assert found["bops"] == made["bops"]
        assert found["junction_bops"] > 0
        assert found["bops"] == found["junction_bops"] + sum(each["bops"] for each in found["layers"])
    assert "of which quantized junctions" in saq("profile", run).stdout


def test_search_uses_the_recorded_table(digits: Path, layers: list[str], tmp_path: Path) -> None:
    costs, budget = table(tmp_path, layers), f"{2 * len(layers) - 3}ms"
    asked = ("--cost", costs, "--budget", budget, "--candidates", "4,8", "--searcher", "error")
    plan = answer("search", *options(digits, *asked), "--run-dir", tmp_path / "run", "--dry-run")
    shown = saq("search", *options(digits, *asked), "--run-dir", tmp_path / "run", "--dry-run").stdout
    found = answer("search", *options(digits, *asked), "--run-dir", tmp_path / "run")

    assert (plan["cost_unit"], plan["budget_cost"], plan["budget_bops"]) == (
        "ps",
        found["budget_cost"],
        None,
    )
    assert plan["cost"] <= plan["budget_cost"] < plan["ceiling_cost"] == 2 * len(layers) * 10**9
    assert f"at most {2 * len(layers) - 3} ms" in shown
    assert f"to {2 * len(layers)} ms" in shown
    written = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()} - {".lock"}
    assert {Path(path).name for path in plan["writes"]} == written

    table(tmp_path, layers, 100.0)
    assert "costs.json was edited since" in last_error(
        saq("search", *options(digits, *asked), "--resume", "--run-dir", tmp_path / "run")
    )
    costs.unlink()
    again = answer("search", "--from", tmp_path / "run", "--budget", budget, "--run-dir", tmp_path / "from")
    assert (again["policy"], again["cost"]) == (found["policy"], found["cost"])
    assert answer("rerun", tmp_path / "run", "--run-dir", tmp_path / "again")["identical"]
    answer("search", "--resume", "--run-dir", tmp_path / "run")
