"""The package saq-apot: the authors' levels, the contract of quantizers, and the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.digits import MODEL, float_options
from tests.support.plugins import plugin_folder, run_python, run_saq, run_tests

QUANTIZERS = ("--weight-quantizer", "apot", "--activation-quantizer", "lsq")
FEW = ("--workers", 0, "--set", "data.calibration_images=64", "--set", "data.verify_images=20")
NO_DATA = ("--data", "tests", "--no-pretrained", "--run-dir", "no/such")
CONTRACT = (
    *("tests/quant/test_quantizers.py", "tests/quant/test_convert.py", "tests/quant/test_layer.py"),
    *("tests/export/test_every_quantizer.py", "tests/training/test_efficient.py"),
)
LEVELS = """
import json
from saq_apot import ApotWeight
from saqcli.quant.quantizers import QUANTIZERS

print(json.dumps([ApotWeight.weight_grid(bits, "auto").codes for bits in range(2, 8)]))
assert ApotWeight.weight_grid(8, "auto") == (-127, 127, 1)
assert QUANTIZERS["apot"].activation is None
"""
# 2 ** exponent of each summand, as the authors' code lists them for 3 to 7 bits
SUMMANDS = {
    3: [[-1, -2, -3]],
    4: [[-1, -2, -4], [-3]],
    5: [[-1, -3, -5], [-2, -4, -6]],
    6: [[-1, -3, -6], [-2, -4, -7], [-5]],
    7: [[-1, -4, -7], [-2, -5, -8], [-3, -6, -9]],
}
LITERAL = {
    2: [0, 1],
    3: [0, 0.25, 0.5, 1],
    4: [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1],
    5: [each / 48 for each in (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48)],
}


@pytest.fixture(scope="module")
def folders() -> tuple[Path, ...]:
    return (plugin_folder("saq-apot"),)


@pytest.fixture(scope="module")
def run(digits: Path, folders: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at 3 bits."""
    path = tmp_path_factory.mktemp("apot") / "run"
    options = (*QUANTIZERS, "--bits", 3, "--epochs", 1, "--no-export", *FEW, "--run-dir", path)
    done = run_saq("quantize", MODEL, *float_options(digits, digits / "few"), *options, folders=folders)
    assert done.returncode == 0, done.stderr
    return path


def positive(levels: list[float]) -> list[float]:
    """The upper half of a symmetric grid, from 0."""
    half = levels[len(levels) // 2 :]
    assert levels == [*(-each for each in reversed(half[1:])), *half]
    return half


def summed(parts: list[list[int]]) -> list[float]:
    """All sums of one or no power of two of each part, divided by the largest."""
    sums = [0.0]
    for exponents in parts:
        sums = [each + more for each in sums for more in (0.0, *(2.0**exponent for exponent in exponents))]
    return sorted(each / max(sums) for each in sums)


def test_levels_are_those_of_the_authors(folders: tuple[Path, ...]) -> None:
    done = run_python(LEVELS, folders=folders)
    assert done.returncode == 0, done.stderr
    found = {bits: positive(levels) for bits, levels in enumerate(json.loads(done.stdout), 2)}
    for bits, expected in LITERAL.items():
        assert found[bits] == pytest.approx(expected, rel=1e-6), bits
    for bits, parts in SUMMANDS.items():
        assert found[bits] == pytest.approx(summed(parts), rel=1e-6), bits
        assert len(found[bits]) == 2 ** (bits - 1)


def test_keeps_the_contract_of_quantizers(folders: tuple[Path, ...]) -> None:
    done = run_tests(*CONTRACT, "-k", "apot", folders=folders)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_run_is_evaluated_as_trained(run: Path, digits: Path, folders: tuple[Path, ...]) -> None:
    done = run_saq("eval", run, "--data", digits / "few", *FEW[:2], "--json", folders=folders)
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "manifest.json").read_text())["results"]
    assert json.loads(done.stdout)["top1"] == results["top1"] > 60
    wanted: dict[str, Any] = json.loads((run / "config.json").read_text())["quantization"]
    assert (wanted["weight_quantizer"], wanted["activation_quantizer"]) == ("apot", "lsq")


@pytest.mark.slow
def test_analysis_shows_the_levels(
    run: Path, digits: Path, folders: tuple[Path, ...], tmp_path: Path
) -> None:
    options = ("--distributions", "--flips", "--images", 40, *FEW[:2], "--out", tmp_path / "out")
    done = run_saq("analyze", run, "--data", digits / "few", *options, folders=folders)
    assert done.returncode == 0, done.stderr
    reading = json.loads((tmp_path / "out" / "distributions.json").read_text())
    layers = {layer["name"]: layer["weights"] for layer in reading["reading"]["layers"]}
    assert positive(layers["layer1.0.conv1"]["table"]) == LITERAL[3]
    assert "table" not in layers["conv1"]  # 8 bits


@pytest.mark.slow
def test_search_uses_the_levels(digits: Path, folders: tuple[Path, ...], tmp_path: Path) -> None:
    options = (*QUANTIZERS, "--searcher", "error", "--bops", "w3a3", *FEW[:2], "--run-dir", tmp_path / "run")
    done = run_saq(
        "search", MODEL, *float_options(digits, digits / "few"), *options, "--json", folders=folders
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["policy"]["layer1.0.conv1"]["weight"] in range(2, 9)


@pytest.mark.slow
def test_onnx_is_refused_before_training(
    run: Path, digits: Path, folders: tuple[Path, ...], tmp_path: Path
) -> None:
    options = (*QUANTIZERS, "--bits", 3, *FEW, "--run-dir", tmp_path / "run")
    trial = run_saq("quantize", MODEL, *float_options(digits, digits / "few"), *options, folders=folders)
    export = run_saq("export", run, "--onnx", tmp_path / "model.onnx", folders=folders)
    reason = "quantizer apot has a table of levels for weights, and ONNX files need uniform grids"
    for done, remedy in (
        (trial, "; use --no-export to write model.safetensors only, or another quantizer"),
        (export, ": use model.safetensors, or another quantizer"),
    ):
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].endswith(reason + remedy)
    assert not list(tmp_path.rglob("*.*"))


WRONG = {
    "--quantizer apot": "quantizer apot is for weights only: choose --activation-quantizer from clip, lsq",
    "--activation-quantizer apot": "quantizer apot is for weights only: choose --activation-quantizer from clip, lsq",
    "--weight-quantizer apot --weight-grid zero": "--weight-grid zero is not defined for quantizer apot: choose auto",
    "--weight-quantizer apo": "no quantizer 'apo': choose from clip, lsq, lsq_plus, asymmetric, pact, dorefa, log2, "
    "adaptive, apot",
}


@pytest.mark.slow
def test_wrong_choices_give_one_line(folders: tuple[Path, ...]) -> None:
    code = f"""
from tests.support.command_line import last_error, saq

for wrong in {list(WRONG)}:
    print(last_error(saq("quantize", "{MODEL}", "--bits", 4, *wrong.split(), *{NO_DATA})))
"""
    done = run_python(code, folders=folders)
    assert done.returncode == 0, done.stderr
    for line, says in zip(done.stdout.splitlines(), WRONG.values(), strict=True):
        assert says in line


@pytest.mark.slow
def test_without_the_package_files_name_it(run: Path) -> None:
    done = run_saq("eval", run, "--data", "tests", folders=())
    assert done.returncode == 1
    assert "no installed package has its quantizer 'apot'" in done.stderr
