"""Exported files: equal to the model, as small as they should be, and refused when they are damaged."""

import json
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors
import torch
from networks import (
    ALL_BITS,
    CLASSES,
    NETWORKS,
    Bank,
    Quantized,
    bank_bits,
    images,
    quantize,
    same_bits,
)
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

from saqcli.algorithms.exporters import EXPORTERS, ModelFacts
from saqcli.algorithms.exporters.onnx_qdq import INPUT, OUTPUT, frozen_copy, read_onnx_facts
from saqcli.algorithms.exporters.safetensors import read_facts, read_tensors, rebuild, stores_codes
from saqcli.errors import CorruptArtifact, UnsupportedModel
from saqcli.quant.convert import Scheme
from saqcli.quant.layers import QuantizedLayer, quantized_layers
from saqcli.quant.quantizers import Quantizer
from saqcli.workflows.predictors import onnx_session
from saqcli.workflows.verify import judge

GRIDS = ("auto", "paper", "zero")
# "auto" is the paper's grid or the integer one: single layers see each at all bits, deep networks meet the default.
EXPORTED = [
    ("bank", "paper"),
    ("bank", "zero"),
    *((name, grid) for name in NETWORKS for grid in ("auto", "zero")),
]
EPSILON = 2.0**-24  # relative rounding error of one float32 operation
INT4, INT8, INT16 = onnx.TensorProto.INT4, onnx.TensorProto.INT8, onnx.TensorProto.INT16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@cache
def network(name: str, grid: str = "auto", granularity: str = "channel") -> Quantized:
    """A network of ``NETWORKS`` at mixed bits, or all single layers at all bits."""
    scheme = Scheme(weight_grid=grid, granularity=granularity)  # type: ignore[arg-type]
    return quantize(Bank, bank_bits, scheme) if name == "bank" else quantize(NETWORKS[name], scheme=scheme)


def architecture(name: str) -> nn.Module:
    """The float network, other weights in it."""
    torch.manual_seed(77)
    return Bank() if name == "bank" else NETWORKS[name]()


def written(folder: Path, style: str, quantized: Quantized, name: str) -> Path:
    """The file of ``quantized``, written once a test session."""
    exporter = EXPORTERS[style]()
    path = folder / f"{name}{exporter.suffix}"
    if not path.exists():
        exporter.export(quantized.model, images(2), path, quantized.facts)
    return path


@torch.no_grad()
def answer(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits


def weights_of(quantized: Quantized) -> dict[str, QuantizedLayer]:
    return {
        n: layer for n, layer in quantized.layers.items() if isinstance(layer.weight_quantizer, Quantizer)
    }


# Every exporter.


@pytest.mark.parametrize("style", EXPORTERS)
def test_exporting_leaves_the_model_as_it_was_and_writes_one_file(style: str, tmp_path: Path) -> None:
    quantized = quantize(NETWORKS["residual"])
    before = {name: value.clone() for name, value in quantized.model.state_dict().items()}
    expected = answer(quantized.model, images(4))
    exporter = EXPORTERS[style]()
    path = tmp_path / f"model{exporter.suffix}"
    exporter.export(quantized.model, images(2), path, quantized.facts)

    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    after = quantized.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(answer(quantized.model, images(4)), expected)
    assert all(p.requires_grad for p in quantized.model.parameters())


@pytest.mark.parametrize("style", EXPORTERS)
def test_the_file_tells_what_the_exporter_was_told(style: str, folder: Path) -> None:
    quantized = network("conv_bn")
    path = written(folder, style, quantized, "conv_bn-auto")
    read = read_onnx_facts if path.suffix == ".onnx" else read_facts

    assert read(path) == quantized.facts


def test_exporting_onnx_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    quantized = network("conv_bn")
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        EXPORTERS["qdq"]().export(quantized.model, images(2), path, quantized.facts)

    assert one.read_bytes() == other.read_bytes()


def test_exporting_safetensors_twice_gives_the_same_header_and_numbers(tmp_path: Path) -> None:
    """Bytes may differ: the library writes the two entries of the metadata in any order."""
    quantized = network("conv_bn")
    parts = []
    for path in (tmp_path / "one", tmp_path / "other"):
        EXPORTERS["safetensors"]().export(quantized.model, images(2), path, quantized.facts)
        whole = path.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        parts.append((json.loads(whole[8:end]), whole[end:]))

    assert parts[0] == parts[1]


# Safetensors.


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["bank", *NETWORKS])
def test_a_rebuilt_model_is_bit_equal(name: str, grid: str, granularity: str, folder: Path) -> None:
    quantized = network(name, grid, granularity)
    path = written(folder, "safetensors", quantized, f"{name}-{grid}-{granularity}")
    model = rebuild(architecture(name), read_facts(path), read_tensors(path), str(path))

    assert torch.equal(answer(model, images(16)), answer(quantized.model, images(16)))
    for one, other in zip(quantized_layers(model).values(), quantized.layers.values(), strict=True):
        assert torch.equal(one.quantized_weight(), other.quantized_weight())
        assert one.bits == other.bits
    latent = {f"{n}.{layer.weight_name}" for n, layer in weights_of(quantized).items() if stores_codes(layer)}
    state = model.state_dict()
    for key, value in quantized.model.state_dict().items():
        assert key in latent or torch.equal(state[key], value), key
    assert not model.training


@pytest.mark.parametrize("name", ["conv_bn", "attention", "standardized"])
def test_a_rebuilt_model_is_saved_as_the_same_tensors(name: str, folder: Path, tmp_path: Path) -> None:
    quantized = network(name)
    path = written(folder, "safetensors", quantized, f"{name}-auto")
    model = rebuild(architecture(name), quantized.facts, read_tensors(path), str(path))
    again = tmp_path / "again.safetensors"
    EXPORTERS["safetensors"]().export(model, images(2), again, quantized.facts)

    one, other = read_tensors(path), read_tensors(again)
    assert list(one) == list(other)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_take_exactly_their_bits(grid: str, folder: Path) -> None:
    quantized = network("bank", grid, "channel")
    tensors = read_tensors(written(folder, "safetensors", quantized, f"bank-{grid}-channel"))
    stored = {n: layer for n, layer in weights_of(quantized).items() if stores_codes(layer)}

    assert {layer.bits.weight for layer in stored.values()} == set(ALL_BITS)
    for name, layer in stored.items():
        assert tensors[f"{name}.codes"].dtype == torch.uint8
        assert tensors[f"{name}.codes"].numel() == ceil(layer.latent_weight().numel() * layer.bits.weight / 8)  # type: ignore[operator]
        assert f"{name}.{layer.weight_name}" not in tensors


def test_the_file_holds_its_tensors_and_a_header_alone(folder: Path) -> None:
    path = written(folder, "safetensors", network("conv_bn"), "conv_bn-auto")
    data = sum(value.numel() * value.element_size() for value in read_tensors(path).values())
    header = int.from_bytes(path.read_bytes()[:8], "little")

    assert path.stat().st_size == 8 + header + data


def test_layers_left_in_floating_point_are_stored_as_they_are(tmp_path: Path) -> None:
    def half(names: Any) -> Any:
        bits = same_bits(4)(names)
        return {name: b.model_copy(update={"weight": None}) if name == "0" else b for name, b in bits.items()}

    quantized = quantize(NETWORKS["conv_bn"], half)
    path = tmp_path / "model.safetensors"
    EXPORTERS["safetensors"]().export(quantized.model, images(2), path, quantized.facts)
    tensors = read_tensors(path)
    model = rebuild(architecture("conv_bn"), read_facts(path), tensors, str(path))

    assert torch.equal(tensors["0.weight"], quantized.layers["0"].latent_weight())
    assert "0.codes" not in tensors
    assert torch.equal(answer(model, images(4)), answer(quantized.model, images(4)))


def refused(path: Path) -> str:
    """The one-line message with which ``path`` is refused."""
    with pytest.raises(CorruptArtifact) as refusal:
        rebuild(architecture("conv_bn"), read_facts(path), read_tensors(path), str(path))
    message = str(refusal.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.fixture
def good(folder: Path) -> Path:
    return written(folder, "safetensors", network("conv_bn"), "conv_bn-auto")


@pytest.mark.parametrize("part", [0, 1, 7, 8, 100, 0.3, 0.6, 0.9, -1])
def test_a_truncated_file_is_refused(part: float, good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole[: int(part * len(whole)) if isinstance(part, float) else part])

    refused(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x03\x04" + bytes(200), bytes(range(256)), b"\xff" * 64],
)
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    refused(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "saq.model.2"}, {"facts": "{}"}])
def test_safetensors_of_others_are_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)

    assert "holds no quantized model of saq" in refused(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.safetensors")
    refused(tmp_path)


def _set(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(facts: dict[str, Any]) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        facts[keys[-1]] = to

    return change


def _drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(facts: dict[str, Any]) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        del facts[keys[-1]]

    return change


FOUR = {"weight": 4, "activation": 4}
TAMPERED: dict[str, Callable[[dict[str, Any]], None]] = {
    "newer_schema": _set("schema_version", to=2),
    "newer_policy": _set("policy", "schema_version", to=2),
    "unknown_key": _set("surprise", to=1),
    "no_policy": _drop("policy"),
    "no_scheme": _drop("scheme"),
    "no_signs": _set("signed", to={}),
    "one_sign_missing": _drop("signed", "3"),
    "sign_is_no_boolean": _set("signed", "0", to="perhaps"),
    "layer_missing": _drop("policy", "layers", "3"),
    "layer_unknown": _set("policy", "layers", "elsewhere", to=FOUR),
    "fewer_bits": _set("policy", "layers", "3", "weight", to=3),
    "more_bits": _set("policy", "layers", "3", "weight", to=8),
    "no_bits": _set("policy", "layers", "3", "weight", to=None),
    "bits_out_of_range": _set("policy", "layers", "3", "weight", to=9),
    "bits_are_text": _set("policy", "layers", "3", "weight", to="4"),
    "other_grid": _set("scheme", "weight_grid", to="zero"),
    "unknown_grid": _set("scheme", "weight_grid", to="hexagonal"),
    "other_granularity": _set("scheme", "granularity", to="tensor"),
    "unknown_quantizer": _set("scheme", "quantizer", to="magic"),
    "routed_parent_unknown": _set("routed", to={"elsewhere": ["0"]}),
    "routed_child_unknown": _set("routed", to={"": ["elsewhere"]}),
    "routed_child_no_layer": _set("routed", to={"": ["1"]}),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_tampered_facts_are_refused(
    change: Callable[[dict[str, Any]], None], good: Path, tmp_path: Path
) -> None:
    facts = json.loads(network("conv_bn").facts.model_dump_json())
    change(facts)
    path = tmp_path / "model.safetensors"
    save_file(read_tensors(good), path, metadata={"format": "saq.model", "facts": json.dumps(facts)})

    refused(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"saq"'])
def test_facts_that_are_no_description_are_refused(text: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(read_tensors(good), path, metadata={"format": "saq.model", "facts": text})

    refused(path)


def _without(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def _with(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: change(tensors[key]).contiguous()})


CHANGED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "codes_missing": _without("3.codes"),
    "steps_missing": _without("3.step"),
    "level_missing": _without("3.weight_quantizer.clipping_level"),
    "input_level_missing": _without("3.input_quantizer.clipping_level"),
    "norm_missing": _without("1.running_mean"),
    "codes_short": _with("3.codes", lambda x: x[:-1]),
    "codes_long": _with("3.codes", lambda x: torch.cat([x, x])),
    "codes_in_float": _with("3.codes", Tensor.float),
    "codes_beyond_the_grid": _with("7.codes", lambda x: torch.full_like(x, 255)),
    "step_scaled": _with("3.step", lambda x: x * 2),
    "step_of_another_shape": _with("3.step", lambda x: x[:1]),
    "level_of_another_shape": _with("3.weight_quantizer.clipping_level", lambda x: x[:, :1]),
    "norm_of_another_shape": _with("1.weight", lambda x: x[:-1]),
    "something_more": lambda tensors: tensors.update(surprise=torch.zeros(1)),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_changed_tensors_are_refused(change: Callable[[dict[str, Tensor]], object], tmp_path: Path) -> None:
    quantized = quantize(NETWORKS["conv_bn"], same_bits(8), Scheme(weight_grid="zero"))
    path = tmp_path / "model.safetensors"
    EXPORTERS["safetensors"]().export(quantized.model, images(2), path, quantized.facts)
    tensors = read_tensors(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "saq.model", "facts": quantized.facts.model_dump_json()})

    refused(path)


def test_another_architecture_is_refused(good: Path) -> None:
    facts, tensors = read_facts(good), read_tensors(good)
    wider = NETWORKS["conv_bn"]()
    wider[3] = nn.Conv2d(4, 7, 3)  # type: ignore[operator]

    for other in (wider, NETWORKS["attention"]()):
        with pytest.raises(CorruptArtifact):
            rebuild(other, facts, tensors, str(good))


# ONNX.


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["bank", *NETWORKS])
def test_the_frozen_copy_is_bit_equal(name: str, grid: str) -> None:
    quantized = network(name, grid, "channel")

    assert torch.equal(answer(frozen_copy(quantized.model), images(16)), answer(quantized.model, images(16)))


def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(str(path)).graph


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def dequantized(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, onnx.TensorProto]]:
    """Every DequantizeLinear over an integer constant."""
    known = constants(graph)
    return (
        (n, known[n.input[0]]) for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in known
    )


@pytest.fixture(params=EXPORTED, ids="-".join)
def exported(request: pytest.FixtureRequest, folder: Path) -> tuple[Quantized, Path]:
    """Every network, as a file."""
    name, grid = request.param
    quantized = network(name, grid, "channel")
    return quantized, written(folder, "qdq", quantized, f"{name}-{grid}")


def test_there_is_one_dequantizer_of_integers_for_every_quantized_weight(
    exported: tuple[Quantized, Path],
) -> None:
    quantized, path = exported

    assert len(list(dequantized(graph_of(path)))) == len(weights_of(quantized))


def test_stored_codes_and_steps_are_those_of_the_quantizers(exported: tuple[Quantized, Path]) -> None:
    quantized, path = exported
    graph = graph_of(path)
    known = constants(graph)
    stored = {
        codes.name.removesuffix(".weight_quantizer.codes"): (numpy_helper.to_array(codes), node)
        for node, codes in dequantized(graph)
    }

    assert set(stored) == set(weights_of(quantized))
    for name, layer in weights_of(quantized).items():
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, Quantizer)
        array, node = stored[name]
        step = numpy_helper.to_array(known[node.input[1]])
        assert np.array_equal(array.astype(np.int32), quantizer.codes(layer.effective_weight()).numpy()), name
        assert np.array_equal(step, quantizer.step().detach().flatten().numpy()), name
        assert [a.i for a in node.attribute if a.name == "axis"] == [layer.channel_dim]
        assert len(node.input) == 2  # zero point 0


def test_codes_lie_in_the_smallest_container(exported: tuple[Quantized, Path]) -> None:
    """INT4 where the codes fit, INT16 only for the paper's 8 bits; and INT4 is packed two a byte."""
    _, path = exported
    for _, codes in dequantized(graph_of(path)):
        array = numpy_helper.to_array(codes).astype(np.int32)
        low, high = array.min(), array.max()
        expected = INT4 if low >= -8 and high <= 7 else INT8 if low >= -127 and high <= 127 else INT16
        assert codes.data_type == expected, codes.name
        if expected == INT4:
            assert len(codes.raw_data) == ceil(prod(codes.dims) / 2)


def test_no_bias_is_fused_with_a_dequantized_weight(exported: tuple[Quantized, Path]) -> None:
    """ONNX Runtime would round it to int32."""
    graph = graph_of(exported[1])
    behind = {node.output[0] for node, _ in dequantized(graph)}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in behind:
            behind.add(node.output[0])
    multiplications = [n for n in graph.node if len(n.input) > 1 and n.input[1] in behind]

    assert multiplications
    for node in multiplications:
        assert node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        assert len([name for name in node.input if name]) == 2, node.name


def test_inputs_are_quantized_into_eight_bits_behind_a_clip(exported: tuple[Quantized, Path]) -> None:
    """A narrower container is refused or miscomputed by ONNX Runtime; without the clip it would hold too many codes."""
    quantized, path = exported
    graph = graph_of(path)
    known = constants(graph)
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                known[node.output[0]] = attribute.t
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    layers = [layer for layer in quantized.layers.values() if isinstance(layer.input_quantizer, Quantizer)]
    if not isinstance(quantized.model, Bank):  # whose layers share the quantized images
        assert len(quantizers) == len(layers)

    assert {known[n.input[2]].data_type for n in quantizers} <= {INT8, onnx.TensorProto.UINT8}
    assert not any(numpy_helper.to_array(known[n.input[2]]).any() for n in quantizers)
    full = {
        layer.input_quantizer.step().item()  # type: ignore[operator, union-attr]
        for layer in layers
        if layer.bits.activation == 8
    }
    for node in quantizers:
        step = numpy_helper.to_array(known[node.input[1]]).item()
        before = producers.get(node.input[0])
        assert step in full or (before is not None and before.op_type == "Clip"), node.name


def test_the_file_is_of_opset_21_and_tells_nothing_of_where_it_was_made(
    exported: tuple[Quantized, Path],
) -> None:
    path = exported[1]
    model = onnx.load(str(path))

    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert model.ir_version == 10
    assert model.producer_name == "saq"
    assert [entry.key for entry in model.metadata_props] == ["saq.facts"]
    assert not model.doc_string
    assert not model.graph.doc_string
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert not model.functions
    for trace in (b"site-packages", b"Traceback", b".py", str(Path.home()).encode()):
        assert trace not in path.read_bytes()


def test_no_constant_is_left_unused(exported: tuple[Quantized, Path]) -> None:
    graph = graph_of(exported[1])
    used = {name for node in graph.node for name in node.input}

    assert {tensor.name for tensor in graph.initializer} <= used


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("grid", ["paper", "zero"])
def test_a_single_layer_equals_the_model_to_float32_rounding(
    grid: str, optimized: bool, folder: Path
) -> None:
    """Products of the same codes, summed in another order: each sum of K terms is within K + 2 roundings of the true
    one, times the sum of magnitudes; 2 for the steps and the bias."""
    quantized = network("bank", grid, "channel")
    path = written(folder, "qdq", quantized, f"bank-{grid}")
    x = images(16, seed=4)
    found = onnx_session(path, optimized=optimized)(x)
    expected = answer(quantized.model, x)
    assert found.shape == expected.shape

    assert isinstance(quantized.model, Bank)
    start = 0
    for name, branch in quantized.model.branches.items():
        (layer,) = quantized_layers(branch).values()
        bound, terms = magnitudes(branch, layer, x)
        width = bound.shape[1]
        difference = (found - expected)[:, start : start + width].abs().double()
        assert (difference <= 2 * (terms + 2) * EPSILON * bound).all(), name
        start += width
    assert start == expected.shape[1]


@torch.no_grad()
def magnitudes(branch: nn.Module, layer: QuantizedLayer, x: Tensor) -> tuple[Tensor, int]:
    """The sum of magnitudes of the terms of every output, in float64, and how many terms there are at most."""
    seen: list[Tensor] = []
    hook = layer.input_quantizer.register_forward_hook(lambda module, args, output: seen.append(output))
    output = branch(x)
    hook.remove()
    weight, inputs = layer.quantized_weight().double().abs(), seen[0].double().abs()
    bias = None if layer.bias is None else layer.bias.double().abs()
    kind: Any = layer
    if isinstance(layer, nn.Linear):
        sums = nn.functional.linear(inputs, weight, bias)
    elif isinstance(layer, nn.Conv1d):
        sums = nn.functional.conv1d(inputs, weight, bias, kind.stride, kind.padding)
    elif isinstance(layer, nn.ConvTranspose2d):
        sums = nn.functional.conv_transpose2d(inputs, weight, bias, kind.stride, kind.padding)
    else:
        padding = "same" if getattr(kind, "same_pad", False) else kind.padding
        sums = nn.functional.conv2d(inputs, weight, bias, kind.stride, padding, kind.dilation, kind.groups)
    assert sums.shape == output.shape
    return sums.flatten(1), weight[0].numel() * (
        weight.shape[0] if isinstance(layer, nn.ConvTranspose2d) else 1
    )


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize(("name", "grid"), [pair for pair in EXPORTED if pair[0] != "bank"])
def test_a_deep_network_agrees_with_the_model(name: str, grid: str, optimized: bool, folder: Path) -> None:
    """An activation on the edge of two codes may fall either way, hence no bound on the largest difference; the median
    image has none: its largest difference is that of a few thousand float32 roundings."""
    quantized = network(name, grid, "channel")
    path = written(folder, "qdq", quantized, f"{name}-{grid}")
    x = images(256, seed=6)
    truth = answer(quantized.model, x)
    found = onnx_session(path, optimized=optimized)(x)

    assert judge(truth, found).verified
    scale = float(truth.abs().max())
    assert float((truth - found).abs().amax(1).median()) <= 4096 * EPSILON * scale


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_bit_width_agrees_with_the_model(bits: int, optimized: bool, folder: Path) -> None:
    quantized = quantize(NETWORKS["depthwise"], same_bits(bits))
    path = written(folder, "qdq", quantized, f"depthwise-{bits}")
    x = images(256, seed=6)

    assert judge(answer(quantized.model, x), onnx_session(path, optimized=optimized)(x)).verified


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_one_step_for_a_tensor_is_exported_as_well(granularity: str, folder: Path) -> None:
    quantized = network("conv_bn", "auto", granularity)
    path = written(folder, "qdq", quantized, f"conv_bn-auto-{granularity}")
    x = images(64, seed=6)
    steps = {len(constants(graph_of(path))[node.input[1]].dims) for node, _ in dequantized(graph_of(path))}

    assert steps == {1 if granularity == "channel" else 0}
    for optimized in (False, True):
        assert judge(answer(quantized.model, x), onnx_session(path, optimized=optimized)(x)).verified


@pytest.mark.parametrize("name", NETWORKS)
def test_any_number_of_images_can_be_given_at_once(name: str, folder: Path) -> None:
    quantized = network(name, "auto", "channel")
    path = written(folder, "qdq", quantized, f"{name}-auto")
    run = onnx_session(path, optimized=True)
    x = images(7, seed=6)
    together = run(x)

    assert together.shape == (7, CLASSES)
    for count in (1, 4):
        assert (run(x[:count]) - together[:count]).abs().median() <= 4096 * EPSILON * together.abs().max()
    model = onnx.load(str(path))
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param
        assert all(d.dim_value for d in value.type.tensor_type.shape.dim[1:])
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == [INPUT, OUTPUT]


def test_one_example_image_is_enough(tmp_path: Path) -> None:
    quantized = network("conv_bn")
    path = tmp_path / "model.onnx"
    EXPORTERS["qdq"]().export(quantized.model, images(1), path, quantized.facts)

    assert onnx_session(path, optimized=True)(images(4)).shape == (4, CLASSES)


def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    class Whimsical(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(108, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.layer(x.flatten(1))
            return logits * 2 if logits.sum().item() > 0 else logits

    quantized = quantize(Whimsical)
    with pytest.raises(UnsupportedModel, match="cannot be exported to ONNX") as refusal:
        EXPORTERS["qdq"]().export(quantized.model, images(2), tmp_path / "model.onnx", quantized.facts)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_exporting_warns_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantized = network("conv_bn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EXPORTERS["qdq"]().export(quantized.model, images(2), tmp_path / "model.onnx", quantized.facts)

    assert capfd.readouterr() == ("", "")


def refused_onnx(path: Path) -> str:
    with pytest.raises(CorruptArtifact) as refusal:
        read_onnx_facts(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(range(256)), b"\xff" * 64])
def test_a_file_that_is_no_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)

    refused_onnx(path)


def test_onnx_of_others_is_refused(folder: Path, tmp_path: Path) -> None:
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
def test_onnx_with_tampered_facts_is_refused(change: str, folder: Path, tmp_path: Path) -> None:
    model = onnx.load(str(written(folder, "qdq", network("conv_bn"), "conv_bn-auto")))
    facts = json.loads(model.metadata_props[0].value)
    TAMPERED[change](facts)
    model.metadata_props[0].value = json.dumps(facts)
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))

    refused_onnx(path)


def test_facts_survive_as_json() -> None:
    facts = network("conv_bn").facts

    assert ModelFacts.model_validate_json(facts.model_dump_json()) == facts


def test_safetensors_hold_no_code(folder: Path) -> None:
    """Nothing but numbers and JSON."""
    with safetensors.safe_open(
        written(folder, "safetensors", network("conv_bn"), "conv_bn-auto"), "pt"
    ) as file:
        assert set(file.metadata()) == {"format", "facts"}
        json.loads(file.metadata()["facts"])
