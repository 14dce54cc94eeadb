"""What proofs of several files of one model share: the trace, the reference, and sums of codes in float32."""

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from saqcli.export import EXPORTERS, STYLES, tracing
from saqcli.progress import SILENT
from saqcli.quant import convert
from saqcli.quant.layer import quantized_layers
from saqcli.verify import shared as shared_module
from saqcli.verify.publish import export_verified
from saqcli.verify.shared import Remembered, SharedProof, in_float64, sum_codes_exactly
from tests.support import tiny
from tests.verify.test_proofs import facts_of, labelled


def quantized(network: str, bits: int) -> tuple[nn.Module, Tensor]:
    net, x = tiny.build(network)
    tiny.quantized(net, x, bits=bits)
    return net.eval(), x


def plain_float64(model: nn.Module) -> nn.Module:
    """The model in float64 with every sum in float64."""
    double = copy.deepcopy(model)
    convert.fold(double)
    return double.double()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("network", ["mlp", "conv_bn", "residual", "depthwise", "grouped", "tokens"])
def test_sums_of_codes_equal_those_in_float64(network: str, bits: int) -> None:
    model, x = quantized(network, bits)
    double = plain_float64(model)
    with torch.no_grad():
        truth = double(x.double())
        changed = sum_codes_exactly(double, x[:1].double())
        answer = double(x.double())

    assert changed == list(quantized_layers(model))
    assert float((answer - truth).abs().max()) <= 1e-13 * float(truth.abs().max())
    assert torch.equal(in_float64(model, x)(x).float(), truth.float())


def test_sums_beyond_float32_stay_in_float64() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(1200, 8), nn.ReLU(), nn.Linear(8, tiny.CLASSES))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(8, 1200).sign() * (1 - 0.1 * torch.rand(8, 1200)))
    x = torch.rand(4, 3, 20, 20)
    tiny.quantized(net, x, bits=8)
    double = plain_float64(net.eval())
    with torch.no_grad():
        assert sum_codes_exactly(double, x.double()) == ["3"]


@pytest.mark.parametrize("network", ["transposed", "functional"])
def test_other_layers_stay_in_float64(network: str) -> None:
    model, x = quantized(network, 4)
    double = plain_float64(model)
    with torch.no_grad():
        truth = double(x.double())
        changed = sum_codes_exactly(double, x.double())
        assert 0 < len(changed) < len(quantized_layers(model))
        torch.testing.assert_close(double(x.double()), truth, rtol=1e-12, atol=1e-12)


def test_a_layer_that_answers_otherwise_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = quantized("conv_bn", 4)
    wrong = shared_module._IntegerSum.__call__

    def off(self: Any, x: Tensor) -> Tensor:
        return wrong(self, x) * (1 + 1e-9)

    monkeypatch.setattr(shared_module._IntegerSum, "__call__", off)
    with torch.no_grad():
        assert sum_codes_exactly(plain_float64(model), x.double()) == []


def test_equal_images_are_computed_once() -> None:
    calls: list[Tensor] = []

    def double(images: Tensor) -> Tensor:
        calls.append(images)
        return images * 2

    predict, x = Remembered(double), torch.arange(6.0).reshape(2, 3)
    assert torch.equal(predict(x), 2 * x)
    assert torch.equal(predict(x.clone()), 2 * x)
    assert torch.equal(predict(x.reshape(3, 2)), 2 * x.reshape(3, 2))
    assert torch.equal(predict(x + 1), 2 * x + 2)
    assert len(calls) == 3


def without_operators(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures of a verdict with numbers of operators in the place of their names."""
    twin = figures["twin"]
    if twin is None:
        return figures
    return figures | {
        "twin": {key: len(value) if isinstance(value, list) else value for key, value in twin.items()}
    }


def test_styles_share_trace_and_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = quantized("residual", 4)
    facts, batches = facts_of(model, x), [labelled(x, 0)]
    traced: list[nn.Module] = []
    trace = tracing.onnx_graph

    def count(form: nn.Module, example: Tensor) -> Any:
        traced.append(form)
        return trace(form, example)

    monkeypatch.setattr(tracing, "onnx_graph", count)
    common = SharedProof(model)
    styles = [style for style in STYLES if STYLES.is_ours(style)]
    for style in styles:
        path, alone = tmp_path / f"{style}.onnx", tmp_path / f"{style}-alone.onnx"
        verdict = export_verified(model, facts, path, style, batches, 1, SILENT, shared=common)
        again = export_verified(model, facts, alone, style, batches, 1, SILENT)
        assert without_operators(again.figures()) == without_operators(verdict.figures())
        assert again.layerwise == verdict.layerwise
        assert without_names(alone) == without_names(path)
    forms = len({STYLES[style].form for style in styles})

    assert len(traced) == forms + len(styles)
    first = tmp_path / "first.onnx"
    EXPORTERS["qdq"]().export(model, torch.zeros(2, *x.shape[1:]), first, facts)
    assert first.read_bytes() == (tmp_path / "qdq.onnx").read_bytes()


def without_names(path: Path) -> list[Any]:
    """Operators with their attributes, and initializers, of a file."""
    graph = onnx.load(str(path)).graph
    nodes = [(node.op_type, [each.SerializeToString() for each in node.attribute]) for node in graph.node]
    return [nodes, sorted(onnx.numpy_helper.to_array(each).tobytes() for each in graph.initializer)]
