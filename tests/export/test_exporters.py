"""Properties of every exporter: the model is unchanged, metadata is complete, and output is reproducible."""

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from saqcli.errors import CorruptArtifact, UnsupportedModel
from saqcli.export import EXPORTERS, STYLES, ModelMetadata
from saqcli.export.containers import weight_storage
from saqcli.export.model_metadata import read_onnx_metadata
from saqcli.export.operators import frozen_copy
from saqcli.export.safetensors import read_content
from saqcli.export.style import CONTAINERS
from saqcli.export.tracing import INPUT, OUTPUT
from saqcli.progress import SILENT
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.verify.hazards import hazards
from saqcli.verify.proof import prove_graph
from saqcli.verify.runtime import onnx_session
from saqcli.verify.verdict import judge
from tests.support.networks import (
    ALL_BITS,
    CLASSES,
    NETWORKS,
    Quantized,
    images,
    mixed_bits,
    quantize,
    same_bits,
)
from tests.support.onnx_files import GRIDS, answer, constants, export, graph_of, network, told, written
from tests.support.sweeps import sweep
from tests.support.tampering import TAMPERED

# Every network in one style; in the others one per kind of product.
EXPORTED = sweep(
    ((name, style) for name in NETWORKS for style in STYLES),
    lambda name, style: style == "qdq" or name in ("conv_bn", "attention"),
)


def within(bits: int, style: str) -> bool:
    least, most = STYLES[style].bits
    return least <= bits <= most


def bits_for(style: str) -> Callable[[Iterable[str]], dict[str, LayerBits]]:
    """Mixed bits, or if a style does not have all of them, its most."""
    whole = style not in STYLES or all(within(bits, style) for bits in ALL_BITS)
    return mixed_bits if whole else same_bits(STYLES[style].bits[1])


def fitting(name: str, style: str) -> Quantized:
    choose = bits_for(style)
    return network(name) if choose is mixed_bits else quantize(NETWORKS[name], choose)


@pytest.mark.parametrize("style", EXPORTERS)
def test_metadata_matches_the_arguments(style: str, folder: Path) -> None:
    quantized = fitting("conv_bn", style)
    path = written(folder, style, quantized, "conv_bn-auto")
    onnx_file = path.suffix == ".onnx"
    found = read_onnx_metadata(path) if onnx_file else read_content(path).metadata

    assert found == quantized.facts


@pytest.mark.parametrize("style", EXPORTERS)
def test_repeated_export_is_byte_identical(
    style: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also without a warning."""
    one = written(folder, style, fitting("conv_bn", style), "conv_bn-auto")
    quantized, other = quantize(NETWORKS["conv_bn"], bits_for(style)), tmp_path / "other"
    before = {name: value.clone() for name, value in quantized.model.state_dict().items()}
    expected = answer(quantized.model, images(4))
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EXPORTERS[style]().export(quantized.model, images(1), other, quantized.facts)

    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [other]
    assert one.read_bytes() == other.read_bytes()
    after = quantized.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(answer(quantized.model, images(4)), expected)
    assert all(p.requires_grad for p in quantized.model.parameters())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["bank", *NETWORKS])
def test_frozen_copy_is_bit_identical(name: str, grid: str) -> None:
    quantized = network(name, grid, "channel")

    assert torch.equal(answer(frozen_copy(quantized.model), images(16)), answer(quantized.model, images(16)))


# Every style of ONNX.


@pytest.mark.parametrize(("name", "style"), EXPORTED)
def test_opset_is_21_and_no_paths_leak(name: str, style: str, folder: Path) -> None:
    path = written(folder, style, fitting(name, style), f"{name}-auto")
    model = onnx.load(str(path))

    others = set(STYLES[style].opsets)
    assert {entry.domain for entry in model.opset_import} == {"", *others}
    assert next(entry.version for entry in model.opset_import if not entry.domain) == 21
    assert model.ir_version == 10
    assert model.producer_name == "saq"
    assert {entry.key for entry in model.metadata_props} == {"saq.facts", "preprocessing", "class_names"}
    assert not model.doc_string
    assert not model.graph.doc_string
    assert not any(node.doc_string for node in model.graph.node)
    assert {function.domain for function in model.functions} == others
    for trace in (b"site-packages", b"Traceback", b".py", str(Path.home()).encode()):
        assert trace not in path.read_bytes()


def test_metadata_is_plain_json(folder: Path) -> None:
    quantized = network("conv_bn")
    model = onnx.load(str(written(folder, "qdq", quantized, "conv_bn-auto")))
    found = {entry.key: json.loads(entry.value) for entry in model.metadata_props}

    assert found["preprocessing"] == quantized.facts.preprocessing
    assert found["class_names"] == list(quantized.facts.class_names)


@pytest.mark.parametrize(("name", "style"), EXPORTED)
def test_quantizer_nodes_state_layer_operand_bits(name: str, style: str, folder: Path) -> None:
    quantized = fitting(name, style)
    graph = graph_of(written(folder, style, quantized, f"{name}-auto"))
    policy = quantized.facts.policy.layers
    found: dict[str, dict[str, set[int]]] = {"input": {}, "weight": {}}
    for facts in filter(None, map(told, graph.node)):
        known = {"saq.layer", "saq.operand", "saq.bits", "saq.zero", "saq.pads", "saq.copy", "saq.order"}
        assert set(facts) <= known
        if "saq.operand" not in facts:  # a part of a quantizer, whose last node has it
            continue
        for layer in facts["saq.layer"].split(" "):
            found[facts["saq.operand"]].setdefault(layer, set()).add(int(facts["saq.bits"]))

    assert found["weight"] == {layer: {bits.weight} for layer, bits in policy.items()}
    assert found["input"] == {layer: {bits.activation} for layer, bits in policy.items()}


@pytest.mark.parametrize(("name", "style"), EXPORTED)
def test_constants_are_all_used(name: str, style: str, folder: Path) -> None:
    graph = graph_of(written(folder, style, fitting(name, style), f"{name}-auto"))
    used = {given for node in graph.node for given in node.input}

    assert set(constants(graph)) <= used


@pytest.mark.parametrize(("name", "style"), EXPORTED)
def test_runtime_optimization_changes_nothing(name: str, style: str, folder: Path) -> None:
    found = hazards(onnx.load(str(written(folder, style, fitting(name, style), f"{name}-auto"))))

    assert {hazard.code for hazard in found} <= set(STYLES[style].conditions)


@pytest.mark.parametrize("style", STYLES)
def test_declared_name_is_that_of_the_table(style: str) -> None:
    assert STYLES[style].name == style
    assert STYLES[style].name
    assert STYLES[style].description


@pytest.mark.parametrize(("name", "style"), EXPORTED)
def test_weights_have_declared_containers(name: str, style: str, folder: Path) -> None:
    found = weight_storage(written(folder, style, fitting(name, style), f"{name}-auto"))

    assert {weight.container for weight in found.weights} <= set(STYLES[style].containers)
    assert {weight.layer for weight in found.weights} == set(fitting(name, style).facts.policy.layers)


@pytest.mark.parametrize("name", ["conv_bn", "attention"])
@pytest.mark.parametrize("style", STYLES)
def test_proof_accepts_every_layer(name: str, style: str, folder: Path) -> None:
    """Of a file whose quantizers are found by what its style declares."""
    quantized = fitting(name, style)
    path = written(folder, style, quantized, f"{name}-auto")
    batches = [(images(16, seed=6), torch.zeros(16, dtype=torch.long))]
    verdict = prove_graph(path, quantized.model, style, batches, 1, SILENT)

    assert not verdict.reasons()
    assert verdict.bit_equal == STYLES[style].bit_equal
    inputs = {layer for check in verdict.layerwise.layers for layer in check.layer.split(" ")}
    assert inputs == set(quantized.facts.policy.layers)


@pytest.mark.parametrize("style", STYLES)
def test_bits_beyond_the_limits_are_refused(
    style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(STYLES[style], "bits", (5, 7))
    quantized = quantize(NETWORKS["conv_bn"], same_bits(4))
    with pytest.raises(UnsupportedModel, match=f"style {style} has 5 to 7 bits only, and 0 has 4: .*`style`"):
        export(quantized, style, tmp_path / "model.onnx")


@pytest.mark.parametrize("style", [style for style in STYLES if within(8, style)])
def test_weights_beyond_the_containers_are_refused(style: str, tmp_path: Path) -> None:
    quantized = quantize(NETWORKS["conv_bn"], same_bits(8), Scheme(weight_grid="paper"))
    if max(CONTAINERS[each][2] for each in STYLES[style].containers) > 255:
        export(quantized, style, tmp_path / "model.onnx")
    else:
        with pytest.raises(UnsupportedModel, match=f"style {style} has .*choose another `style`"):
            export(quantized, style, tmp_path / "model.onnx")


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize(("name", "style"), EXPORTED)
def test_deep_network_matches_the_model(name: str, style: str, optimized: bool, folder: Path) -> None:
    quantized = fitting(name, style)
    path = written(folder, style, quantized, f"{name}-auto")
    x = images(256, seed=6)

    assert judge(answer(quantized.model, x), onnx_session(path, optimized=optimized)(x)).verified


@pytest.mark.parametrize(
    ("bits", "style"),
    sweep(
        ((bits, style) for style in STYLES for bits in ALL_BITS if within(bits, style)),
        lambda bits, style: bits == (8 if style == "exact" or STYLES[style].tightest == "most" else 2),
    ),
)
def test_every_bit_width_matches_the_model(bits: int, style: str, folder: Path) -> None:
    quantized = quantize(NETWORKS["depthwise"], same_bits(bits))
    path = written(folder, style, quantized, f"depthwise-{bits}")
    x, expected = images(256, seed=6), quantized.model
    if STYLES[style].deployed:  # with integer biases, which at 2 bits are coarse in a depthwise layer
        expected = STYLES[style]().form(frozen_copy(expected), x[:2])

    for optimized in (False, True):
        assert judge(answer(expected, x), onnx_session(path, optimized=optimized)(x)).verified


@pytest.mark.parametrize(("name", "style"), EXPORTED)
def test_batch_size_is_dynamic(name: str, style: str, folder: Path) -> None:
    """Compares the median logit, since a code at a rounding edge may differ with another summation order."""
    path = written(folder, style, fitting(name, style), f"{name}-auto")
    run = onnx_session(path, optimized=True)
    x = images(7, seed=6)
    together = run(x)

    assert together.shape == (7, CLASSES)
    for count in (1, 4):
        assert (run(x[:count]) - together[:count]).abs().median() <= 2.0**-12 * together.abs().max()
    model = onnx.load(str(path))
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param
        assert all(d.dim_value for d in value.type.tensor_type.shape.dim[1:])
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == [INPUT, OUTPUT]


@pytest.mark.parametrize("style", sweep(STYLES, lambda style: style in ("qdq", "exact")))
def test_untraceable_model_is_refused(style: str, tmp_path: Path) -> None:
    class Whimsical(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(108, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.layer(x.flatten(1))
            return logits * 2 if logits.sum().item() > 0 else logits

    quantized = quantize(Whimsical)
    with pytest.raises(UnsupportedModel, match="cannot be exported to ONNX") as refusal:
        export(quantized, style, tmp_path / "model.onnx")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


# Foreign files.


def refused_onnx(path: Path) -> str:
    with pytest.raises(CorruptArtifact) as refusal:
        read_onnx_metadata(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(range(256)), b"\xff" * 64])
def test_non_onnx_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)

    refused_onnx(path)


def test_foreign_onnx_is_refused(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(str(written(folder, "qdq", network("conv_bn"), "conv_bn-auto")))
    del model.metadata_props[:]
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))

    assert "was not exported by saq" in refused_onnx(path)
    refused_onnx(tmp_path / "nothing.onnx")
    refused_onnx(tmp_path)


@pytest.mark.parametrize(
    "change", ["newer_schema", "unknown_key", "no_policy", "no_signs", "bits_out_of_range"]
)
def test_tampered_metadata_is_refused(change: str, folder: Path, tmp_path: Path) -> None:
    model = onnx.load(str(written(folder, "qdq", network("conv_bn"), "conv_bn-auto")))
    entry = next(entry for entry in model.metadata_props if entry.key == "saq.facts")
    facts = json.loads(entry.value)
    TAMPERED[change](facts)
    entry.value = json.dumps(facts)
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))

    refused_onnx(path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "", "{", "1"]
)
def test_malformed_metadata_is_refused(text: str, folder: Path, tmp_path: Path) -> None:
    """At any nesting depth."""
    model = onnx.load(str(written(folder, "qdq", network("conv_bn"), "conv_bn-auto")))
    next(entry for entry in model.metadata_props if entry.key == "saq.facts").value = text
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))

    assert len(refused_onnx(path)) < len(str(path)) + 200


def test_metadata_survives_json() -> None:
    facts = network("conv_bn").facts

    assert ModelMetadata.model_validate_json(facts.model_dump_json()) == facts
