"""saq profile --measure: which layer a kernel of ONNX Runtime belongs to, and the table of costs."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import saqcli
from saqcli.api.budgets import priced
from saqcli.api.networks import policy_of
from saqcli.export import ModelMetadata
from saqcli.export.restore import restore
from saqcli.pipelines.demo import MODEL, SIDE
from saqcli.pipelines.latency import measure
from saqcli.pipelines.latency.measure import LatencySettings, measure_latency
from saqcli.progress import SILENT
from saqcli.quant import convert
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.network import Network, trace_network
from saqcli.verify.layer_times import REST, ProfiledFile, layers_of_kernels, layers_of_nodes
from tests.support import tiny
from tests.support.command_line import answer, last_error, saq


@pytest.fixture(scope="module")
def network() -> Network:
    net, x = tiny.build("residual")
    convert.wrap(net)
    return trace_network(net, x[:1], "residual")


def nodes(*triples: tuple[str, str, str]) -> onnx.GraphProto:
    """A graph of (operator, inputs, output), with an initializer for every name with a point."""
    made = [onnx.helper.make_node(op, names.split(), [out], name=f"node_{out}") for op, names, out in triples]
    constants = {name for _, names, _ in triples for name in names.split() if "." in name}
    arrays = [onnx.helper.make_tensor(name, 1, [1], [0.0]) for name in sorted(constants)]
    return onnx.helper.make_graph(made, "g", [], [], arrays)


def test_fused_and_renamed_kernels_keep_their_layer() -> None:
    original = nodes(
        ("Conv", "images a.weight", "x"),
        ("BatchNormalization", "x a.norm a.norm_bias", "y"),
        ("Relu", "y", "z"),
        ("Conv", "z b.weight", "u"),
        ("Add", "u z", "v"),
        ("Flatten", "v", "w"),
        ("Gemm", "w b.head.weight", "logits"),
    )
    optimized = nodes(
        ("Conv", "images reorder", "reorder_token_0"),
        ("Conv", "reorder_token_0 reorder_1", "reorder_token_1"),
        ("ReorderOutput", "reorder_token_1", "u"),
        ("Add", "u z", "v"),
        ("Flatten", "v", "w"),
        ("Gemm", "w b.head.weight", "logits"),
    )
    for node, name in zip(optimized.node, ("z_nchwc", "kernel", "ReorderOutput_1"), strict=False):
        node.name = name
    layers = ["a", "b", "b.head"]

    assert layers_of_nodes(original, layers[::-1]) == ["a", "a", "a", "b", REST, REST, "b.head"]
    found = layers_of_kernels(optimized, original, layers[::-1])
    assert list(found.values()) == ["a", REST, "b", REST, REST, "b.head"]


def test_every_layer_has_its_kernels(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LatencySettings(widths=("w8a8", "w4a8"), repeats=3)
    found = measure_latency(network, settings, SILENT)
    names = [layer.name for layer in network.costs.layers]

    assert found.widths == ("float", "w8a8", "w4a8")
    for width in found.widths:
        assert list(found.columns[width]) == names
        assert all(cost > 0 for cost in found.columns[width].values()), width
        assert found.sums[width] == pytest.approx(sum(found.columns[width].values()) + found.rest[width])
        assert 0 < found.least[width] <= found.whole[width]
    pinned = {layer.name for layer in network.costs.layers if layer.pinned}
    assert {name for name, costs in found.layers.items() if "w4a8" not in costs} == pinned

    found.write(tmp_path / "cpu.json")
    costs = priced(network.costs, str(tmp_path / "cpu.json"))
    config = costs.uniform("residual", LayerBits(weight=8, activation=8))
    milliseconds = costs.cost(config).bops / 1e9
    assert costs.unit == "ps"
    entries = [min(cost for width, cost in found.layers[name].items() if width == "w8a8") for name in names]
    assert milliseconds == pytest.approx(sum(entries) + found.table.other, abs=1e-4)
    about = json.loads((tmp_path / "cpu.json").read_text())["about"]
    assert {"cpu", "threads", "style", "rounds", "versions", "sum_ms", "whole_file_ms"} <= set(about)


def test_profile_has_the_same_kernels_in_every_run(network: Network, tmp_path: Path) -> None:
    from saqcli.pipelines.latency.measure import _export_quantized

    _export_quantized(network, Scheme(), policy_of(network, bits="w8a8"), "qdq", tmp_path / "net.onnx")
    file = ProfiledFile(tmp_path / "net.onnx", 1, [layer.name for layer in network.costs.layers])
    for count in (1, 2, 5):
        file.run(torch.randn(count, 3, 8, 8))
    runs = file.layer_seconds()

    assert len(runs) == 3
    assert len({tuple(run) for run in runs}) == 1


def test_command_writes_a_table_for_a_search(tmp_path: Path) -> None:
    network = (MODEL, "--num-classes", 10, "--in-chans", 1, "--input-size", SIDE)
    out = tmp_path / "cpu.json"
    options = ("--measure", "--repeats", 2, "--widths", "w8a8", "--out", out)
    shown = saq("profile", *network, *options, "--quiet")
    found = answer("profile", *network, *options)

    assert shown.exit_code == 0, shown.stderr
    assert "whole file" in shown.stdout
    assert max(map(len, shown.stdout.split("AMD")[0].splitlines()[:8])) <= 80
    assert found["out"] == str(out)
    assert set(json.loads(out.read_text())["layers"]) == set(found["columns"]["w8a8"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--repeats", 3), "--repeats requires --measure: add it"),
        (("--measure", "--out", "cpu.txt"), "--out cpu.txt does not end with .json"),
        (("--measure", "--widths", "w9a9"), "asks for 9 bits"),
        (("--measure", "--style", "none"), "there is no export style 'none'"),
        (("--measure", "--threads", 100000), "100000: this machine has"),
        (("--measure", "--bits", 4), "measures several widths"),
    ],
)
def test_impossible_measurements_are_refused(options: tuple[object, ...], says: str) -> None:
    assert says in last_error(saq("profile", "saq/resnet20", *options))


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ModelMetadata]]:
    """Style and metadata of every file that is measured."""
    found: list[tuple[str, ModelMetadata]] = []
    export = measure._export

    def noted(style: str, model: nn.Module, network: Network, path: Path, metadata: ModelMetadata) -> None:
        found.append((style, metadata))
        export(style, model, network, path, metadata)

    monkeypatch.setattr(measure, "_export", noted)
    return found


NET = (MODEL, "--num-classes", 10, "--in-chans", 1, "--input-size", SIDE)
SHORT = ("--measure", "--repeats", 1)


def test_files_of_a_target_are_measured(exported: list[tuple[str, ModelMetadata]], tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    found = answer("profile", *NET, *SHORT, "--target", "int8-generic", "--out", out)
    about = json.loads(out.read_text())["about"]

    assert found["widths"] == ["float", "w8a8"]  # 8 bits are all that it runs
    assert (about["target"], about["style"]) == ("int8-generic", "qdq")
    quantized = exported[1][1]
    assert quantized.scheme == Scheme(weight_grid="zero", target="int8-generic")
    assert quantized.junctions is not None
    assert {each.kind for each in quantized.junctions.operators.values()} == {"add", "pool"}


def test_files_are_quantized_as_the_run_was(
    exported: list[tuple[str, ModelMetadata]], digits: Path, tmp_path: Path
) -> None:
    chosen = ("--target", "ort-cpu", "--granularity", "tensor", "--short-steps", 4, "--bits", 8)
    data = ("--data", digits / "few", "--epochs", 0, "--batch-size", 32, "--workers", 0, "--no-export")
    answer("quantize", *NET, *data, *chosen, "--no-pretrained", "--run-dir", tmp_path / "run")
    model = tmp_path / "run" / "artifacts" / "model.safetensors"
    metadata = restore(model)[1]
    for source in (tmp_path / "run", model):
        exported.clear()
        found = answer("profile", source, *SHORT, "--widths", "w8a8")
        assert (found["about"]["style"], found["about"]["target"]) == ("ort", "ort-cpu")
        [(_, _), (style, measured)] = exported
        assert style == "ort"
        assert (measured.scheme, measured.junctions) == (metadata.scheme, metadata.junctions)
        assert measured.absorbed == metadata.absorbed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--measure", "--target", "int8-generic", "--widths", "w4a8"), "runs weights of 8 bits, and"),
        (("--measure", "--target", "tensorrt", "--style", "qdq"), "reads files of style trt, not qdq"),
        (("--target", "int8-generic", "--bits", 4), "runs weights of 8 bits, and layer1.0.conv1 has 4"),
        (("--target", "int8-generic", "--candidates", "2,3"), "the candidates are 2 or 3"),
        (("--target", "nothing"), "nothing"),
    ],
)
def test_profile_refuses_what_the_target_cannot_run(options: tuple[object, ...], says: str) -> None:
    net = ("saq/resnet20", "--no-pretrained", "--num-classes", 10)
    assert says in last_error(saq("profile", *net, *options))


def test_profile_of_a_run_has_its_own_target(tmp_path: Path) -> None:
    net = saqcli.quantize_model(saqcli.load_model("saq/resnet20", pretrained=False, num_classes=10), 8)
    saqcli.save(net, tmp_path / "net.safetensors")
    error = last_error(saq("profile", tmp_path / "net.safetensors", "--target", "ort-cpu"))
    assert "net.safetensors has its own target: remove --target" in error


def test_profile_reaches_what_the_target_runs(tmp_path: Path) -> None:
    (tmp_path / "chip.toml").write_text(
        'description = "a chip"\njunctions = ["add"]\ncount_junctions = true\n[weights]\nbits = [4, 8]\n'
    )
    net = ("saq/resnet20", "--no-pretrained", "--num-classes", 10)
    plain, found = answer("profile", *net), answer("profile", *net, "--target", tmp_path / "chip.toml")

    assert found["bops"] == plain["bops"] + found["junction_bops"]
    assert found["floor_size_bytes"] > plain["floor_size_bytes"]
    assert "junction_bops" not in plain
