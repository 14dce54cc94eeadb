"""The layerwise proof detects one wrong layer, and passes a correct graph."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from saqcli.export import EXPORTERS, ModelMetadata
from saqcli.export.operators import frozen_copy
from saqcli.quant.convert import Scheme, active_bits
from saqcli.quant.layer import quantized_layers
from saqcli.verify.layerwise import LARGEST_ERROR, check_layers
from tests.support import tiny
from tests.support.onnx_files import told
from tests.support.sweeps import sweep


def exported(name: str, bits: int, path: Path) -> tuple[nn.Module, Tensor]:
    net, x = tiny.build(name)
    write(net, x, bits, path)
    return net, x


def write(net: nn.Module, x: Tensor, bits: int, path: Path, style: str = "qdq") -> None:
    """Quantize ``net`` and export it."""
    tiny.quantized(net, x, bits)
    net.eval()
    layers = list(quantized_layers(net))
    facts = ModelMetadata(
        saq_version="0",
        build={},
        preprocessing={},
        policy=active_bits(net, "tiny", layers),
        scheme=Scheme(),
        signed=dict.fromkeys(layers, True),
        routed={},
    )
    EXPORTERS[style]().export(net, x[:2], path, facts)


@pytest.mark.parametrize(
    ("name", "bits"),
    sweep(
        ((name, bits) for name in ("conv_bn", "residual", "depthwise", "tokens") for bits in (2, 4, 8)),
        lambda name, bits: bits == {"conv_bn": 2, "depthwise": 8}.get(name, 4),
    ),
)
def test_correct_graph_passes_every_part(name: str, bits: int, tmp_path: Path) -> None:
    net, x = exported(name, bits, tmp_path / "model.onnx")

    check = check_layers(tmp_path / "model.onnx", frozen_copy(net), x)

    assert check.passed
    assert check.largest_error < LARGEST_ERROR / 5
    assert len(check.layers) >= 2


def test_single_wrong_layer_is_found(tmp_path: Path) -> None:
    net, x = exported("residual", 4, tmp_path / "model.onnx")

    for layer in quantized_layers(net).values():
        layer.latent_weight().data.mul_(-1)
        check = check_layers(tmp_path / "model.onnx", frozen_copy(net), x)
        layer.latent_weight().data.mul_(-1)

        assert not check.passed


def test_missing_quantizer_is_found(tmp_path: Path) -> None:
    net, x = exported("conv_bn", 4, tmp_path / "model.onnx")
    frozen = frozen_copy(net)
    next(iter(quantized_layers(frozen).values())).input_quantizer = nn.Identity()

    check = check_layers(tmp_path / "model.onnx", frozen, x)

    assert check.problem is not None
    assert not check.passed


class Again(nn.Module):
    """Calls one layer several times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, tiny.CLASSES)


class ChangedInPlace(Again):
    """The layer's input is overwritten between its two calls."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        first = self.again(y)
        y.relu_()
        logits: Tensor = self.head((first - self.again(y)).mean((2, 3)))
        return logits


class SameTwice(Again):
    """Two of three calls get equal tensors and so are one call in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        total = self.again(torch.relu(y)) + self.again(torch.relu(y)) + self.again(y)
        logits: Tensor = self.head(total.mean((2, 3)))
        return logits


def quantizers_of(graph: Any, layer: str) -> list[Any]:
    """The first nodes on a layer's input, one per call."""
    found = [node for node in graph.node if told(node).get("saq.layer") == layer and node.op_type == "Clip"]
    assert all(told(node)["saq.operand"] == "input" for node in found)
    return found


@pytest.mark.parametrize(
    ("kind", "style"),
    sweep(
        ((kind, style) for kind in (ChangedInPlace, SameTwice) for style in ("qdq", "trt")),
        lambda kind, style: (kind is SameTwice) == (style == "trt"),
    ),
)
def test_repeated_calls_are_distinguished(kind: type[Again], style: str, tmp_path: Path) -> None:
    """Each is accepted when right and detected when wrong."""
    path, x = tmp_path / "model.onnx", tiny.images((3, 8, 8))
    net = kind()
    write(net, x, 4, path, style)
    frozen = frozen_copy(net)
    check = check_layers(path, frozen, x)

    assert check.passed
    assert [layer.layer for layer in check.layers].count("again") == 2
    assert check.largest_error < LARGEST_ERROR / 5

    for wrong, right in ((0, 1), (1, 0)):
        model = onnx.load(str(path))
        calls = quantizers_of(model.graph, "again")
        calls[wrong].input[0] = calls[right].input[0]
        _sort(model.graph)
        onnx.save(model, str(path.with_name("wrong.onnx")))

        assert not check_layers(path.with_name("wrong.onnx"), frozen, x).passed


def _sort(graph: Any) -> None:
    """Sort nodes topologically."""
    known = {value.name for value in [*graph.input, *graph.initializer]} | {""}
    waiting, done = list(graph.node), []
    while waiting:
        ready = next(node for node in waiting if known >= set(node.input))
        waiting.remove(ready)
        done.append(ready)
        known |= set(ready.output)
    del graph.node[:]
    graph.node.extend(done)


def test_border_codes_after_offset_are_checked(tmp_path: Path) -> None:
    """Padding after the offset subtraction would surround the image with the wrong code."""
    path, x = tmp_path / "model.onnx", tiny.images((3, 8, 8))
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    write(net, x, 8, path, "trt")
    frozen = frozen_copy(net)
    assert check_layers(path, frozen, x).passed

    model = onnx.load(str(path))
    pad, sub, code = (
        next(node for node in model.graph.node if node.op_type == kind)
        for kind in ("Pad", "Sub", "QuantizeLinear")
    )
    assert (sub.input[0], code.input[0]) == (pad.output[0], sub.output[0])
    sub.input[0], pad.input[0], code.input[0] = pad.input[0], sub.output[0], pad.output[0]
    model.graph.node.remove(pad)
    model.graph.node.insert(list(model.graph.node).index(sub) + 1, pad)
    onnx.save(model, str(path))
    check = check_layers(path, frozen, x)

    assert check.problem is None
    assert check.wrong == ("1",)
    assert [layer.wrong for layer in check.layers] == [2 * len(x) * 3 * (10 * 10 - 8 * 8)]


class Cancelling(nn.Module):
    """A norm removes a large mean, leaving rounding error in every runtime."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, tiny.CLASSES)
        with torch.no_grad():
            self.one.bias.fill_(mean)
            self.norm.running_mean.fill_(mean)
            self.norm.running_var.fill_(1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.norm(self.one(x))).relu().mean((2, 3)))


def test_tolerance_equals_pytorch_rounding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Cancelling(3000.0).eval(), tiny.images((3, 6, 6))
    write(net, x, 8, tmp_path / "model.onnx")
    check = check_layers(tmp_path / "model.onnx", frozen_copy(net), x)
    second = next(layer for layer in check.layers if layer.layer == "two")
    assert second.allowed > LARGEST_ERROR
    assert check.passed

    plain = Cancelling(0.0).eval()
    write(plain, x, 8, tmp_path / "plain.onnx")
    check = check_layers(tmp_path / "plain.onnx", frozen_copy(plain), x)
    assert check.passed
    assert all(layer.allowed < 20 * LARGEST_ERROR for layer in check.layers)


def test_small_bias_rounding_is_tolerated(tmp_path: Path) -> None:
    """0.01 of a step changes almost no code, however small the values; a tenth of a step is a difference."""
    torch.manual_seed(0)
    net, x = tiny.build("conv_bn")
    write(net, x, 8, tmp_path / "model.onnx")
    faint = x * 0.05  # of the calibrated range
    model = onnx.load(str(tmp_path / "model.onnx"))
    frozen = frozen_copy(net)
    assert check_layers(tmp_path / "model.onnx", frozen, faint).passed
    for share, passed in ((0.002, True), (0.2, False)):
        graph = onnx.ModelProto()
        graph.CopyFrom(model)
        quantizer = next(
            n for n in graph.graph.node if n.op_type == "QuantizeLinear" and told(n).get("saq.layer") == "3"
        )
        values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer}
        step = float(values[quantizer.input[1]])
        clip = next((n for n in graph.graph.node if n.output[0] == quantizer.input[0]), None)
        target = clip if clip is not None and clip.op_type in ("Clip", "Relu") else quantizer
        shift = onnx.numpy_helper.from_array(torch.tensor(share * step).numpy(), "shift")
        graph.graph.initializer.append(shift)
        added = onnx.helper.make_node("Add", [target.input[0], "shift"], ["shifted"])
        target.input[0] = "shifted"
        graph.graph.node.insert(list(graph.graph.node).index(target), added)
        onnx.save(graph, str(tmp_path / "shifted.onnx"))
        assert check_layers(tmp_path / "shifted.onnx", frozen, faint).passed is passed


class Spare(Again):
    """Uses a layer for something it does not return."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        self.again(y)
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


class EqualTensors(Again):
    """A layer with zero weights gets equal inputs twice, which the graph merges."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.again.weight)
        nn.init.zeros_(self.again.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        y = y + self.again(y)
        y = y + self.again(y)
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("kind", "calls", "style"),
    sweep(
        (
            (kind, calls, style)
            for kind, calls in ((Spare, 0), (EqualTensors, 2))
            for style in ("qdq", "exact")
        ),
        lambda kind, calls, style: (kind is Spare) == (style == "qdq"),
    ),
)
def test_graph_may_merge_or_split_calls(kind: type[Again], calls: int, style: str, tmp_path: Path) -> None:
    path, x = tmp_path / "model.onnx", tiny.images((3, 8, 8))
    net = kind()
    write(net, x, 8, path, style)
    check = check_layers(path, frozen_copy(net), x)

    assert check.passed
    assert [layer.layer for layer in check.layers] == ["stem", *["again"] * calls, "head"]
