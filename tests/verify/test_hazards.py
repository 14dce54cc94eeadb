"""Hazards of ONNX Runtime's optimizer: real, detected by the list, and avoided by our styles.

Every hazard is a graph built by hand without our countermeasure. If a newer ONNX Runtime handles it correctly, the
test is skipped with the version, and the countermeasure may be removed.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from saqcli.export import STYLES
from saqcli.export.integer_kernels import LARGEST_SHIFT
from saqcli.export.operators import frozen_copy
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.verify.hazards import hazards
from saqcli.verify.layerwise import check_layers
from saqcli.verify.runtime import onnx_session
from tests.support.networks import Mean, Tokens, images, quantize, same_bits
from tests.support.onnx_files import answer, export
from tests.support.sweeps import sweep

PLAIN, DEFAULT = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL
Build = Callable[..., onnx.NodeProto]
node: Build = helper.make_node


class Hand:
    """A graph built by hand, ``x`` to ``y``."""

    def __init__(self, shape: list[int], opset: int = 21, ir_version: int = 10) -> None:
        self.shape, self.opset, self.ir_version = shape, opset, ir_version
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.dice = np.random.default_rng(0)

    def add(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(node(op_type, inputs, [name], name=name, **attributes))
        return name

    def constant(self, array: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def quantized(self, x: str, step: float = 0.37, zero: Any = np.uint8(0)) -> str:
        """``x`` quantized and dequantized."""
        inputs = [self.constant(np.float32(step)), self.constant(zero)]
        return self.add("DequantizeLinear", [self.add("QuantizeLinear", [x, *inputs]), *inputs])

    def weight(self, shape: list[int], dtype: Any = np.int8, highest: int = 7, axis: int = 0) -> str:
        """Integer codes with a DequantizeLinear, one step per channel."""
        codes = self.dice.integers(-highest - 1, highest + 1, shape).astype(dtype)
        steps = self.dice.uniform(0.02, 0.2, shape[axis]).astype(np.float32)
        return self.add("DequantizeLinear", [self.constant(codes), self.constant(steps)], axis=axis)

    def bias(self, count: int) -> str:
        return self.constant(self.dice.normal(size=count).astype(np.float32))

    def model(self, output: str) -> onnx.ModelProto:
        self.nodes.append(node("Identity", [output], ["y"]))
        infos = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *self.shape]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ]
        graph = helper.make_graph(self.nodes, "hand", infos[:1], infos[1:], self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version)


def run(model: onnx.ModelProto, level: Any, x: Any) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def changed(model: onnx.ModelProto, shape: list[int]) -> float:
    """The share of values that default optimizations change by more than float32 rounding."""
    x = np.random.default_rng(1).normal(size=[64, *shape]).astype(np.float32)
    plain, found = run(model, PLAIN, x), run(model, DEFAULT, x)
    return float((np.abs(plain - found) > 1e-5 * np.abs(plain).max()).mean())


def codes_of(model: onnx.ModelProto) -> list[str]:
    return [hazard.code for hazard in hazards(model)]


def skip() -> None:
    pytest.skip(f"ONNX Runtime {ort.__version__} leaves it alone")


def conv(bias: str) -> onnx.ModelProto:
    """A 2-bit convolution between quantizers, with its bias inside, after it, or none."""
    hand = Hand([8, 6, 6])
    inputs = [hand.quantized("x", 0.9), hand.weight([4, 8, 3, 3], highest=1)]
    shift = hand.bias(4) if bias == "inside" else ""
    y = hand.add("Conv", [*inputs, shift] if shift else inputs, pads=[1, 1, 1, 1])
    if bias == "behind":
        y = hand.add("Add", [y, hand.constant(hand.dice.normal(size=(1, 4, 1, 1)).astype(np.float32))])
    return hand.model(hand.quantized(hand.add("Relu", [y]), 0.31))


def gemm(kind: str) -> onnx.ModelProto:
    """A linear layer with 2-D inputs: one Gemm, Gemm and Add, or MatMul and Add."""
    hand = Hand([24])
    x = hand.quantized("x", 0.9)
    weight = hand.weight([24, 6], highest=1, axis=1)
    bias = hand.bias(6)
    if kind == "inside":
        y = hand.add("Gemm", [x, weight, bias])
    else:
        y = hand.add("Add", [hand.add("Gemm" if kind == "behind" else "MatMul", [x, weight]), bias])
    return hand.model(hand.quantized(y, 0.31, np.int8(0)))


@pytest.mark.parametrize(
    ("build", "careless", "careful", "shape"),
    [
        (conv, "inside", "behind", [8, 6, 6]),
        (gemm, "inside", "behind", [24]),
        (gemm, "matmul", "behind", [24]),
    ],
    ids=["conv", "gemm", "matmul"],
)
def test_h1_bias_between_quantizers_is_rounded(
    build: Callable[[str], onnx.ModelProto], careless: str, careful: str, shape: list[int]
) -> None:
    assert codes_of(build(careless)) == ["H1"]
    assert codes_of(build(careful)) == []
    assert changed(build(careful), shape) == 0
    if changed(build(careless), shape) == 0:
        skip()
    assert changed(build(careless), shape) > 1e-4


def test_h1b_float_weight_is_requantized() -> None:
    def build(kind: str) -> onnx.ModelProto:
        hand = Hand([8, 6, 6])
        x = hand.quantized("x", 0.2)
        steps = np.exp(hand.dice.normal(size=(4, 1, 1, 1)) * 2)
        weight = hand.constant((hand.dice.normal(size=(4, 8, 3, 3)) * steps).astype(np.float32))
        integers = hand.weight([4, 8, 3, 3])
        y = hand.add("Conv", [x, weight if kind == "float" else integers], pads=[1, 1, 1, 1])
        return hand.model(hand.quantized(y, 0.31, np.int8(0)))

    assert codes_of(build("float")) == ["H1b"]
    assert codes_of(build("codes")) == []
    assert changed(build("codes"), [8, 6, 6]) <= 1e-3  # QLinearConv: ties
    if changed(build("float"), [8, 6, 6]) == 0:
        skip()
    assert changed(build("float"), [8, 6, 6]) > 0.05


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_h2_float_input_is_quantized(kind: str) -> None:
    def build(how: str) -> onnx.ModelProto:
        hand = Hand([64])
        if how == "dequantized":
            weight = hand.weight([64, 32], ml_dtypes.int4, axis=1)
        else:
            codes = hand.constant(hand.dice.integers(-8, 8, (64, 32)).astype(ml_dtypes.int4))
            one = hand.add("DequantizeLinear", [codes, hand.constant(np.float32(1))])
            weight = hand.add("Mul", [one, hand.constant(np.full((1, 32), 0.1, np.float32))])
        return hand.model(hand.add(kind, ["x", weight]))

    assert codes_of(build("dequantized")) == ["H2"]
    assert codes_of(build("scaled")) == []
    assert changed(build("scaled"), [64]) == 0
    if changed(build("dequantized"), [64]) == 0:
        skip()
    assert changed(build("dequantized"), [64]) > 0.5


@pytest.mark.parametrize("dtype", [ml_dtypes.uint4, ml_dtypes.int4])
def test_h3_clip_before_narrow_quantizer_fails(dtype: Any) -> None:
    def build(zero: Any) -> onnx.ModelProto:
        hand = Hand([8])
        ends = [hand.constant(np.float32(end)) for end in (0, 6)]
        clip = hand.add("Clip", [hand.add("Neg", ["x"]), *ends])
        return hand.model(hand.quantized(clip, 0.4, zero))

    careless = build(np.zeros((), dtype))
    assert codes_of(careless) == ["H3"]
    assert codes_of(build(np.uint8(0))) == []
    assert changed(build(np.uint8(0)), [8]) == 0
    run(careless, PLAIN, np.zeros((1, 8), np.float32))
    try:
        run(careless, DEFAULT, np.zeros((1, 8), np.float32))
    except Exception as error:  # onnxruntime has a class for every reason
        assert "zero_point" in str(error)  # noqa: PT017
    else:
        skip()


@pytest.mark.parametrize(("dtype", "zero"), [(ml_dtypes.int4, 0), (ml_dtypes.uint4, 5)])
def test_h4_relu_before_quantizer_is_removed(dtype: Any, zero: int) -> None:
    def build(kind: Any, point: int) -> onnx.ModelProto:
        hand = Hand([8])
        relu = hand.add("Relu", [hand.add("Neg", ["x"])])
        return hand.model(hand.quantized(relu, 0.4, np.array(point).astype(kind)))

    assert codes_of(build(dtype, zero)) == ["H4"]
    for kind, point in ((ml_dtypes.uint4, 0), (np.uint8, 0), (np.int8, 0), (np.uint8, 7)):
        assert codes_of(build(kind, point)) == []
        assert changed(build(kind, point), [8]) == 0
    if changed(build(dtype, zero), [8]) == 0:
        skip()
    assert changed(build(dtype, zero), [8]) > 0.2


def test_h5_2_bit_weights_give_invalid_graph() -> None:
    def build(dtype: Any) -> onnx.ModelProto:
        hand = Hand([8, 6, 6], opset=25, ir_version=12)
        y = hand.add("Conv", [hand.quantized("x", 0.5), hand.weight([4, 8, 3, 3], dtype, 1)])
        return hand.model(hand.quantized(y, 0.31, np.int8(0)))

    careless, careful = build(ml_dtypes.int2), build(ml_dtypes.int4)
    x = np.random.default_rng(1).normal(size=(4, 8, 6, 6)).astype(np.float32)
    assert codes_of(careless) == ["H5"]
    assert codes_of(careful) == []
    assert changed(careful, [8, 6, 6]) == 0
    truth = run(careless, PLAIN, x)
    try:
        found = run(careless, DEFAULT, x)
    except Exception as error:  # onnxruntime has a class for every reason
        assert "int2" in str(error)  # noqa: PT017
    else:
        if np.array_equal(found, truth):
            skip()


def requantized(between: str) -> onnx.ModelProto:
    """A tensor on two grids, one after the other, with an operator between the quantizers that changes nothing."""
    hand = Hand([8, 6, 6])
    x = hand.quantized("x", 0.03, np.uint8(128))
    return hand.model(hand.quantized(hand.add(between, [x], axis=1) if between else x, 0.071, np.uint8(100)))


def test_h10_second_of_two_grids_is_lost() -> None:
    assert codes_of(requantized("")) == ["H10"]
    assert codes_of(requantized("Concat")) == []
    assert changed(requantized("Concat"), [8, 6, 6]) == 0
    if changed(requantized(""), [8, 6, 6]) == 0:
        skip()


def test_h8_gemm_loses_its_factor() -> None:
    def build(alpha: float) -> onnx.ModelProto:
        hand = Hand([24])
        y = hand.add("Gemm", [hand.quantized("x", 0.1), hand.weight([24, 6], axis=1)], alpha=alpha)
        return hand.model(hand.quantized(y, 0.31, np.int8(0)))

    assert codes_of(build(0.5)) == ["H8"]
    assert codes_of(build(1.0)) == []
    if changed(build(0.5), [24]) == 0:
        skip()
    assert changed(build(0.5), [24]) > 0.1


# The same layers, as exported by our styles.

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "H1": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5),
    ),
    "H2": lambda: nn.Sequential(Tokens(), nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 8), Mean(), nn.Linear(8, 5)),
    "H3": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.Hardtanh(), nn.Flatten(), nn.Linear(32, 5)
    ),
}  # fmt: skip


def differing(path: Path, x: Tensor) -> float:
    """The share of logits that default optimizations change by more than float32 rounding."""
    plain, found = (onnx_session(path, optimized=optimized)(x) for optimized in (False, True))
    return float(((plain - found).abs() > 1e-5 * plain.abs().max()).double().mean())


@pytest.mark.parametrize(
    ("case", "style", "bits"),
    sweep(
        product(LAYERS, STYLES, (2, 3, 4)),
        lambda case, style, bits: bits == 2 and (style == "qdq" or case == "H1"),
    ),
)
def test_exported_styles_have_no_hazards(case: str, style: str, bits: int, tmp_path: Path) -> None:
    quantized = quantize(LAYERS[case], same_bits(bits), Scheme(weight_grid="zero"))
    path = export(quantized, style, tmp_path / "model.onnx")

    assert hazards(onnx.load(str(path))) == []
    # Codes at rounding edges may differ; a rounded bias changes a hundred times as many.
    assert differing(path, images(256, seed=3)) <= (0 if STYLES[style].bit_equal else 0.01)


@pytest.mark.parametrize(
    ("case", "style", "bits"),
    sweep(
        (
            (case, style, bits)
            for case, style in (*product(("H2",), STYLES), ("H1", "qdq"), ("H1", "trt"), ("H3", "qdq"))
            for bits in (2, 4, 8)
        ),
        lambda case, style, bits: bits == 4 and (case == "H2" or style == "trt"),
    ),
)
def test_weight_only_layers_keep_float_inputs(case: str, style: str, bits: int, tmp_path: Path) -> None:
    quantized = quantize(
        LAYERS[case], lambda names: {name: LayerBits(weight=bits, activation=None) for name in names}
    )
    x = images(64, seed=3)
    path = export(quantized, style, tmp_path / "model.onnx")
    truth = answer(quantized.model, x)

    assert hazards(onnx.load(str(path))) == []
    for optimized in (False, True):
        found = onnx_session(path, optimized=optimized)(x)
        assert float((found - truth).abs().max()) <= 1e-5 * float(truth.abs().max())
    assert check_layers(path, frozen_copy(quantized.model), x[:4]).passed


# Integer kernels.


def kernels(path: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs by default."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    return Counter(each.op_type for each in graph.node)


class Split(nn.Module):
    """Two parallel convolutions with concatenated outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)


CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "bn_relu": (lambda: [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()], 1),
    "relu6": (lambda: [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU6()], 1),
    "bn_relu6": (lambda: [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6()], 1),
    "linear": (lambda: [nn.Conv2d(3, 4, 3, padding=1)], 1),
    "maxpool": (lambda: [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 1, 1)], 1),
    "concat": (lambda: [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), Split()], 3),
}


def chain(name: str) -> Callable[[], nn.Module]:
    width = 8 if name == "concat" else 4
    return lambda: nn.Sequential(*CHAINS[name][0](), nn.Conv2d(width, 5, 3), nn.Flatten())


@pytest.mark.parametrize(
    ("name", "quantizer"),
    sweep(
        ((name, quantizer) for name in CHAINS for quantizer in ("clip", "lsq_plus")),
        lambda name, quantizer: (quantizer == "lsq_plus") == (name == "bn_relu") and name != "relu6",
    ),
)
def test_8_bit_layers_run_on_integers(name: str, quantizer: str, tmp_path: Path) -> None:
    """All but the last, whose output is not quantized."""
    quantized = quantize(chain(name), same_bits(8), Scheme(quantizer=quantizer))
    path = export(quantized, "qdq", tmp_path / "model.onnx")
    found = kernels(path)

    assert found["QLinearConv"] == CHAINS[name][1]
    assert sum(count for kind, count in found.items() if kind.endswith("Conv")) == CHAINS[name][1] + 1
    assert hazards(onnx.load(str(path))) == []
    x = images(64, seed=3)
    truth = answer(quantized.model, x)
    assert check_layers(path, frozen_copy(quantized.model), x[:8]).passed
    for optimized in (False, True):
        difference = (onnx_session(path, optimized=optimized)(x) - truth).abs()
        assert float(difference.mean()) <= 1e-3 * float(truth.std())


@pytest.mark.parametrize("width", [1, 64])
def test_bias_is_rounded_only_where_harmless(width: int, tmp_path: Path) -> None:
    """With few products per sum, rounding the bias would shift the output too far: it stays float."""
    quantized = quantize(
        lambda: nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3),
            nn.Flatten(),
        ),
        same_bits(8),
    )
    path = export(quantized, "qdq", tmp_path / "model.onnx")
    graph = onnx.load(str(path)).graph
    known = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    made = {name: each for each in graph.node for name in each.output}
    readers = {name: each for each in graph.node for name in each.input}
    units: dict[str, float] = {}
    for each in graph.node:
        if each.op_type == "Conv" and len(each.input) > 2:
            codes, unit = (known[name] for name in made[each.input[2]].input[:2])
            assert codes.dtype == np.int32
            behind = readers[each.output[0]]
            quantizer = readers[behind.output[0]] if behind.op_type == "Relu" else behind
            layer: Any = quantized.layers[made[each.input[1]].input[0].removesuffix(".codes")]
            off = np.abs(codes * unit.astype(np.float64) - layer.bias.detach().double().numpy()).max()
            assert off <= LARGEST_SHIFT * known[quantizer.input[1]]
            units[each.name] = float(off)

    assert kernels(path)["QLinearConv"] == len(units)
    assert width == 1 or len(units) == 2


def test_exact_graph_never_runs_on_integers(tmp_path: Path) -> None:
    """ONNX Runtime's integer kernels round ties differently."""
    found = kernels(export(quantize(chain("bn_relu"), same_bits(8)), "exact", tmp_path / "model.onnx"))

    assert found["QLinearConv"] == 0


def test_narrower_layer_stays_float(tmp_path: Path) -> None:
    path = export(quantize(chain("bn_relu"), same_bits(4)), "qdq", tmp_path / "model.onnx")

    assert kernels(path)["QLinearConv"] == 0
