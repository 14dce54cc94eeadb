"""The package saq-named-nodes: the contract of styles, the command line and its proof; broken packages."""

import json
from pathlib import Path

import onnx
import pytest

from tests.support.image_folders import noise
from tests.support.plugins import plugin_folder, run_saq, run_tests

CONTRACT = ("tests/export/test_exporters.py", "tests/verify/test_hazards.py", "tests/cli/test_options.py")
NETWORK = ("timm/test_resnet", "--no-pretrained", "--num-classes", 3, "--input-size", 32)
BROKEN = {
    "raises": ("raise RuntimeError('no kernels')", "it cannot be loaded (RuntimeError: no kernels)"),
    "lacks": ("class STYLE: suffix = '.onnx'", "it is STYLE, not a class derived from OnnxStyle"),
    "unnamed": (
        "from saqcli.export import OnnxStyle\nclass STYLE(OnnxStyle): pass",
        "since it does not keep the contract: its name is not one line",
    ),
}


@pytest.fixture(scope="module")
def folders() -> tuple[Path, ...]:
    return (plugin_folder("saq-named-nodes"),)


@pytest.fixture(scope="module")
def run(folders: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose ONNX file is in this style; the images lie beside it."""
    folder = tmp_path_factory.mktemp("named")
    for split, count in (("train", 6), ("val", 12)):
        for number in range(count):
            path = folder / "images" / split / f"class{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(number).save(path)
    options = ("--data", folder / "images", "--epochs", 0, "--bits", "w4a4", "--style", "named_nodes")
    done = run_saq(
        "quantize", *NETWORK, *options, "--workers", 0, "--run-dir", folder / "run", "--json", folders=folders
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["onnx_style"] == "named_nodes"
    return folder / "run"


def test_keeps_the_contract_of_styles(folders: tuple[Path, ...]) -> None:
    done = run_tests(*CONTRACT, "-k", "named_nodes", folders=folders)

    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_saq_quantize_writes_named_nodes(run: Path) -> None:
    file = run / "artifacts" / "model.onnx"
    nodes = {node.name: node.op_type for node in onnx.load(str(file)).graph.node}
    verdict = json.loads(file.with_suffix(".verdict.json").read_text())

    assert (
        nodes["layer1.0.conv1/weight/dequantize"] == nodes["conv1.0/input/dequantize"] == "DequantizeLinear"
    )
    assert nodes["conv1.0/input/quantize"] == "QuantizeLinear"
    assert (verdict["style"], verdict["verified"], verdict["layers"] > 5) == ("named_nodes", True, True)
    assert len(verdict["per_layer"]) == verdict["layers"]


@pytest.mark.slow  # saq quantize exports with it above
def test_saq_export_and_eval_take_it(run: Path, folders: tuple[Path, ...], tmp_path: Path) -> None:
    file, images = tmp_path / "model.onnx", ("--data", run.parent / "images", "--workers", 0, "--json")
    given = ("--onnx", file, "--style", "named_nodes", *images)
    done = run_saq("export", run, *given, folders=folders)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["style"], found["verified"], found["conditions"]) == ("named_nodes", True, [])
    assert found["size_note"] is None or "Style named_nodes has UINT8 containers only" in found["size_note"]

    assert file.read_bytes() == (run / "artifacts" / "model.onnx").read_bytes()
    done = run_saq("eval", file, *images, folders=())  # without the package
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 12


@pytest.mark.slow
def test_codes_beyond_uint8_are_refused_early(run: Path, folders: tuple[Path, ...], tmp_path: Path) -> None:
    options = ("--epochs", 0, "--bits", "w8a8", "--weight-grid", "paper", "--style", "named_nodes")
    data = ("--data", run.parent / "images", "--workers", 0, "--run-dir", tmp_path / "run", "--quiet")
    done = run_saq("quantize", *NETWORK, *options, *data, folders=folders)

    assert done.returncode == 1
    assert "in style named_nodes: style named_nodes has UINT8 weights only" in done.stderr
    assert "or another --style" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_broken_style_disables_itself_only(folders: tuple[Path, ...], tmp_path: Path) -> None:
    package = tmp_path / "packages"
    about = package / "broken-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    points = [f"{name} = broken_{name}:STYLE" for name in BROKEN]
    (about / "entry_points.txt").write_text("\n".join(["[saqcli.styles]", *points]))
    for name, (code, _) in BROKEN.items():
        (package / f"broken_{name}.py").write_text(code)

    given = ("export", "no/such/run", "--onnx", tmp_path / "model.onnx", "--style")
    for name, (_, why) in BROKEN.items():
        done = run_saq(*given, name, folders=(*folders, package))
        assert done.returncode == 1
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert f"export style {name} of package broken is disabled, " in error
        assert why in error
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(BROKEN)
    shown = run_saq("export", "--help", folders=(*folders, package)).stdout
    assert "named_nodes" in shown
    done = run_saq(*given, "named_nodes", folders=(*folders, package))
    assert "no export style" not in done.stderr
    assert "is disabled" not in done.stderr.splitlines()[-1]
