"""saq profile --measure: which layer a kernel of ONNX Runtime belongs to, and the table of costs."""

import json
from pathlib import Path

import onnx
import pytest
import torch

from saqcli.api.budgets import priced
from saqcli.pipelines.demo import MODEL, SIDE
from saqcli.pipelines.latency.measure import LatencySettings, measure_latency
from saqcli.progress import SILENT
from saqcli.quant import convert
from saqcli.quant.bits import LayerBits
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

    _export_quantized(network, "w8a8", "qdq", tmp_path / "net.onnx")
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
