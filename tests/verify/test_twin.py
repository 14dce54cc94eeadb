"""ONNX Runtime's answers have the bits of the twin's: operator by operator on random files, and whole networks."""

from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from saqcli.errors import CorruptArtifact, UnsupportedModel
from saqcli.export import STYLES
from saqcli.export.operators import frozen_copy
from saqcli.progress import SILENT
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.verify.hazards import hazards, summaries
from saqcli.verify.proof import prove_graph
from saqcli.verify.twin import Machine, Twin
from saqcli.verify.twin.check import OTHER_PROCESSOR, TwinCheck, check_twin, unlike
from saqcli.verify.twin.products import saturating_pairs, saturation_error
from saqcli.verify.twin.rounding import fma
from saqcli.verify.verdict import Verdict
from tests.export.test_saturation import chain, pairwise_sum, spread
from tests.support.networks import conv_bn, images, quantize, same_bits
from tests.support.onnx_files import export
from tests.support.qdq_files import QdqFile, optimized_kernels, run_file

HERE = Machine.here()
pytestmark = pytest.mark.skipif(HERE is None, reason="the twin has the arithmetic of x86 processors")
Dice = np.random.Generator
Built = tuple[QdqFile, str, int]  # a file, the name of its output, and its number of dimensions
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def step(dice: Dice) -> float:
    return float(np.float32(np.exp(dice.uniform(-5, 0))))


def zero(dice: Dice, dtype: Any = np.uint8) -> int:
    ends = np.iinfo(dtype)
    return int(dice.choice([ends.min, (ends.min + ends.max + 1) // 2, dice.integers(ends.min, ends.max + 1)]))


def codes(dice: Dice, shape: tuple[int, ...]) -> tuple[Any, int]:
    """Weights and their zero point: INT8, or UINT8 around any zero."""
    if dice.random() < 0.5:
        return dice.integers(-127, 128, shape).astype(np.int8), 0
    return dice.integers(0, 256, shape).astype(np.uint8), int(dice.choice([128, 100]))


def bias(file: QdqFile, dice: Dice, step_x: float, steps: Any, outputs: int) -> list[str]:
    """An INT32 bias in units of the accumulator, or none."""
    if dice.random() < 0.4:
        return []
    units = np.asarray(np.float32(step_x) * np.asarray(steps, np.float32), np.float32)
    parts = [dice.integers(-50_000, 50_000, outputs).astype(np.int32), units, np.zeros(units.shape, np.int32)]
    axis = {"axis": 0} if units.ndim else {}
    return [file.node("DequantizeLinear", [file.constant(part) for part in parts], **axis)]


def spread_step(dice: Dice, step_x: float, steps: Any, products: int) -> float:
    """A step with which sums of so many products use the range of codes."""
    deviation = step_x * float(np.max(steps)) * 70 * 70 * products**0.5
    return float(np.float32(deviation / 60 * np.exp(dice.uniform(-1, 1))))


def convolution(dice: Dice) -> Built:
    """Dense, grouped, depthwise and pointwise, with odd sizes, strides, pads and dilations."""
    kind = str(dice.choice(["dense", "aligned", "grouped", "depthwise", "pointwise"]))
    groups, channels, outputs = 1, int(dice.integers(1, 20)), int(dice.integers(1, 40))
    if kind == "aligned":  # the indirect kernel for multiples of 4 and 8 channels
        channels, outputs = 4 * int(dice.integers(1, 9)), 8 * int(dice.integers(2, 6))
    elif kind == "grouped":
        groups = int(dice.integers(2, 4))
        channels, outputs = groups * int(dice.integers(1, 6)), groups * int(dice.integers(2, 9))
    elif kind == "depthwise":
        groups = channels = outputs = int(dice.choice([1, 3, 8, 16, 32, 33]))
    kernel = (1, 1) if kind == "pointwise" else tuple(int(size) for size in dice.integers(1, 4, 2))
    file = QdqFile((channels, *(int(size) for size in dice.integers(5, 12, 2))))
    weight, weight_zero = codes(dice, (outputs, channels // groups, *kernel))
    steps = [step(dice) for _ in range(outputs)] if dice.random() < 0.7 else step(dice)
    step_x = step(dice)
    axis = 0 if isinstance(steps, list) else None
    inputs = [file.quantized("x", step_x, zero(dice)), file.weight(weight, steps, axis, weight_zero)]
    y = file.node(
        "Conv",
        inputs + bias(file, dice, step_x, steps, outputs),
        group=groups,
        strides=[int(stride) for stride in dice.integers(1, 3, 2)],
        dilations=[1, 1] if kind == "pointwise" else [int(each) for each in dice.integers(1, 3, 2)],
        pads=[int(pad) for pad in dice.integers(0, 3, 4)] if dice.random() < 0.6 else [0] * 4,
    )
    after = zero(dice)
    if dice.random() < 0.3:
        y, after = file.node("Relu", [y]), 0
    return file, file.quantized(y, spread_step(dice, step_x, steps, weight[0].size), after), 4


def gemm(dice: Dice) -> Built:
    """With and without a quantizer after it, of unsigned or signed inputs."""
    inputs, outputs = int(dice.integers(1, 70)), int(dice.integers(1, 50))
    dtype: Any = np.int8 if dice.random() < 0.2 else np.uint8
    transposed = int(dice.integers(0, 2))
    shape = (outputs, inputs) if transposed else (inputs, outputs)
    weight, weight_zero = codes(dice, shape)
    if dtype is np.int8:
        weight, weight_zero = dice.integers(-127, 128, shape).astype(np.int8), 0
    steps = [step(dice) for _ in range(outputs)] if dice.random() < 0.7 else step(dice)
    file, step_x = QdqFile((inputs,)), step(dice)
    axis = (0 if transposed else 1) if isinstance(steps, list) else None
    operands = [
        file.quantized("x", step_x, zero(dice, dtype), dtype),
        file.weight(weight, steps, axis, weight_zero),
    ]
    y = file.node("Gemm", operands + bias(file, dice, step_x, steps, outputs), transB=transposed)
    if dice.random() < 0.5:
        y = file.quantized(y, spread_step(dice, step_x, steps, inputs), zero(dice, dtype), dtype)
    return file, y, 2


def matmul(dice: Dice) -> Built:
    """Of every row of an image, with and without a quantizer after it."""
    rows, inputs, outputs = (int(dice.integers(1, most)) for most in (5, 70, 50))
    file, step_x = QdqFile((rows, inputs)), step(dice)
    weight, weight_zero = codes(dice, (inputs, outputs))
    steps = [step(dice) for _ in range(outputs)] if dice.random() < 0.5 else step(dice)
    axis = 1 if isinstance(steps, list) else None
    y = file.node(
        "MatMul", [file.quantized("x", step_x, zero(dice)), file.weight(weight, steps, axis, weight_zero)]
    )
    if dice.random() < 0.5:
        y = file.quantized(y, spread_step(dice, step_x, steps, inputs), zero(dice))
    return file, y, 3


def of_two(op: str) -> Callable[[Dice], Built]:
    """Add or Mul of equal shapes, and of one that is broadcast over rows, channels or pixels."""

    def build(dice: Dice) -> Built:
        file = QdqFile(tuple(int(size) for size in dice.integers(1, 9, 3)))
        dtype: Any = np.int8 if dice.random() < 0.3 else np.uint8
        a, b = file.quantized("x", step(dice), zero(dice, dtype), dtype), file.node("Neg", ["x"])
        dims = [None, None, [2, 3], [1], [3]][int(dice.integers(0, 5))]
        if dims is not None:
            b = file.node("ReduceMax", [b, file.constant(np.array(dims))], keepdims=1)
        b = file.quantized(b, step(dice), zero(dice, dtype), dtype)
        y = file.node(op, [a, b] if dice.random() < 0.6 else [b, a])
        return file, file.quantized(y, step(dice), zero(dice, dtype), dtype), 4

    return build


def hard_swish(dice: Dice) -> Built:
    """The codes of x with another step, a constant code, perhaps a product; where x is 0, the sum is nearly a tie."""
    pixels = dice.integers(1, 9, 2) if dice.random() < 0.5 else np.ones(2)
    file = QdqFile((int(dice.integers(1, 40)), *(int(size) for size in pixels)))
    step_x, zero_x = step(dice), zero(dice)
    x = file.quantized(file.node("Relu", ["x"]), step_x, zero_x)
    sixth = [file.constant(np.float32(step_x / 6)), file.constant(np.array(zero_x, np.uint8))]
    sixth_of_x = file.node("DequantizeLinear", [file.nodes[-1].input[0], *sixth])
    half = file.weight(np.ones([1] * int(dice.choice([0, 1, 3, 4])), np.uint8), 0.5, None)
    gate = file.quantized(file.node("Add", [sixth_of_x, half]), 1 / 255, 0)
    if dice.random() < 0.5:
        return file, gate, 4
    y = file.node("Mul", [x, gate])
    return file, file.quantized(y, step_x * float(np.exp(dice.uniform(-0.7, 0.3))), zero(dice)), 4


def concat(dice: Dice) -> Built:
    """One operand on the grid of the result, two on other grids."""
    file = QdqFile(tuple(int(size) for size in dice.integers(1, 9, 3)))
    grid = step(dice), zero(dice)
    parts = [
        file.quantized("x", *grid),
        *(file.quantized(file.node(op, ["x"]), step(dice), zero(dice)) for op in ("Neg", "Abs")),
    ]
    return file, file.quantized(file.node("Concat", parts, axis=1), *grid), 4


def of_one(op: str) -> Callable[[Dice], Built]:
    """A pool or an activation."""

    def build(dice: Dice) -> Built:
        file = QdqFile(tuple(int(size) for size in dice.integers(3, 12, 3)))
        dtype: Any = np.int8 if dice.random() < 0.3 else np.uint8
        step_x = step(dice)
        attributes: dict[str, Any] = {"alpha": 0.1} if op == "LeakyRelu" else {}
        if op == "AveragePool":
            kernel = [int(size) for size in dice.integers(1, 4, 2)]
            attributes = {
                "kernel_shape": kernel,
                "strides": [int(stride) for stride in dice.integers(1, 3, 2)],
                "pads": [int(dice.integers(0, size)) for size in kernel * 2],
                "count_include_pad": int(dice.integers(0, 2)),
                "ceil_mode": int(dice.integers(0, 2)),
            }
        y = file.node(op, [file.quantized("x", step_x, zero(dice, dtype), dtype)], **attributes)
        after = 1 / 200 if op == "Sigmoid" else step_x * float(np.exp(dice.uniform(-0.7, 0.3)))
        return file, file.quantized(y, after, zero(dice, dtype), dtype), 4

    return build


def moves(dice: Dice) -> Built:
    """A quantizer that moves up through MaxPool, and a dequantizer that moves down through Transpose and Reshape."""
    file = QdqFile(tuple(int(size) for size in dice.integers(3, 9, 3)))
    weight = dice.integers(-127, 128, (16, file.shape[0], 3, 3)).astype(np.int8)
    step_x, step_w = step(dice), step(dice)
    y = file.node(
        "Conv", [file.quantized("x", step_x, zero(dice)), file.weight(weight, step_w, None)], pads=[1] * 4
    )
    y = file.node("Relu", [y])
    ceil = int(dice.integers(0, 2))
    y = file.node("MaxPool", [y], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, ceil_mode=ceil)
    y = file.quantized(y, spread_step(dice, step_x, step_w, weight[0].size), 0)
    y = file.node(
        "Reshape", [file.node("Transpose", [y], perm=[0, 2, 3, 1]), file.constant(np.array([0, -1]))]
    )
    return file, y, 2


BUILDERS: dict[str, Callable[[Dice], Built]] = {
    "conv": convolution,
    "gemm": gemm,
    "matmul": matmul,
    "add": of_two("Add"),
    "mul": of_two("Mul"),
    "hard swish": hard_swish,
    "concat": concat,
    "global average pool": of_one("GlobalAveragePool"),
    "average pool": of_one("AveragePool"),
    "sigmoid": of_one("Sigmoid"),
    "leaky relu": of_one("LeakyRelu"),
    "moves": moves,
}


@pytest.mark.parametrize("kind", BUILDERS)
@given(seed=seeds)
@few
def test_operators_equal_the_twin_bit_by_bit(kind: str, seed: int, tmp_path: Path) -> None:
    dice = np.random.default_rng(seed)
    file, output, rank = BUILDERS[kind](dice)
    path = file.save(tmp_path / "file.onnx", output, rank)
    count = int(dice.integers(1, 4))
    x = (dice.standard_normal((count, *file.shape)) * np.exp(dice.uniform(-2, 3))).astype(np.float32)
    assert HERE is not None

    twin = Twin(path, HERE)

    assert twin.kernels == optimized_kernels(path, tmp_path)
    assert twin.exact
    assert twin.run(x).tobytes() == run_file(path, x).tobytes()


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Images one by one, as ``quantize_static`` reads them."""

    def __init__(self, x: Any) -> None:
        self.images = iter([{"x": image[None]} for image in x])

    def get_next(self) -> Any:
        return next(self.images, None)


def residual_network(folder: Path) -> Path:
    """A float graph: convolutions with ReLUs, an addition, a pool, a depthwise layer, a mean, a linear layer."""
    dice = np.random.default_rng(0)
    file = QdqFile((3, 9, 9))

    def conv(x: str, outputs: int, inputs: int, size: int, **attributes: Any) -> str:
        weight = dice.normal(0, (size * size * inputs) ** -0.5, (outputs, inputs, size, size)).astype(
            np.float32
        )
        pads = [size // 2] * 4
        operands = [x, file.constant(weight), file.constant(dice.normal(0, 0.1, outputs).astype(np.float32))]
        return file.node("Conv", operands, pads=pads, **attributes)

    first = file.node("Relu", [conv("x", 8, 3, 3)])
    second = conv(file.node("Relu", [conv(first, 8, 8, 3)]), 8, 8, 1)
    total = file.node("Relu", [file.node("Add", [first, second])])
    pooled = file.node("MaxPool", [total], kernel_shape=[2, 2], strides=[2, 2])
    depthwise = file.node("Relu", [conv(pooled, 8, 1, 3, group=8)])
    mean = file.node("Flatten", [file.node("GlobalAveragePool", [depthwise])])
    weight = file.constant(dice.normal(0, 0.3, (8, 5)).astype(np.float32))
    y = file.node("Gemm", [mean, weight, file.constant(dice.normal(0, 0.1, 5).astype(np.float32))])
    return file.save(folder / "float.onnx", y, 2)


@pytest.mark.parametrize(
    ("activations", "weights"), [("QUInt8", "QInt8"), ("QUInt8", "QUInt8"), ("QInt8", "QInt8")]
)
def test_files_of_quantize_static_equal_the_twin(activations: str, weights: str, tmp_path: Path) -> None:
    """With signed activations some groups stay in floating point; those on codes are equal all the same."""
    x = np.random.default_rng(1).standard_normal((6, 3, 9, 9)).astype(np.float32)
    path = tmp_path / "static.onnx"
    quantize_static(
        str(residual_network(tmp_path)),
        str(path),
        _Reader(x),
        per_channel=True,
        activation_type=QuantType[activations],
        weight_type=QuantType[weights],
    )
    assert HERE is not None
    twin = Twin(path, HERE)

    assert unlike(path, twin, x) == ()
    if activations == "QUInt8":
        assert twin.exact
        assert {op: count for op, count in twin.kernels.items() if op.startswith("Q")} == {
            "QLinearConv": 4,
            "QLinearAdd": 1,
            "QLinearGlobalAveragePool": 1,
            "QGemm": 1,
        }
        assert twin.run(x).tobytes() == run_file(path, x).tobytes()
    else:
        assert twin.kernels["QLinearConv"] > 0


def test_other_roundings_are_found(tmp_path: Path) -> None:
    """A twin without fused multiply-add, or without saturation where the runtime saturates, is not the file's."""
    assert HERE is not None
    dice = np.random.default_rng(3)
    file = QdqFile((8, 9, 9))
    a, b = file.quantized("x", 0.03), file.quantized(file.node("Neg", ["x"]), 0.0171)
    weight = dice.integers(90, 128, (16, 8, 3, 3)).astype(np.int8)
    total = file.quantized(file.node("Add", [a, b]), 0.0123)
    y = file.quantized(file.node("Conv", [total, file.weight(weight, 0.01, None)]), 0.9)
    path = file.save(tmp_path / "file.onnx", y, 4)
    x = dice.standard_normal((4, *file.shape)).astype(np.float32)

    assert unlike(path, Twin(path, HERE), x) == ()
    if HERE.saturates:
        (name,) = unlike(path, Twin(path, Machine(HERE.fused)), x)
        assert name.startswith("Conv")
        assert (Twin(path, Machine(HERE.fused)).run(x) > run_file(path, x)).any()  # lost to saturation


@given(st.lists(st.lists(st.integers(-128, 127), min_size=5, max_size=5), min_size=1, max_size=3), seeds)
def test_saturation_is_that_of_neighbours(rows: list[list[int]], seed: int) -> None:
    weight = np.array(rows, np.int8)
    inputs = np.random.default_rng(seed).choice([0, 128, 255], (4, 5)).astype(np.uint8)

    exact = inputs.astype(np.int32) @ weight.T.astype(np.int32)
    found = exact + saturation_error(inputs, weight)

    assert found.tolist() == [[pairwise_sum(row, column) for column in weight] for row in inputs]
    if not saturating_pairs(weight).any():
        assert (found == exact).all()


@given(*[st.floats(-(2.0**40), 2.0**40, width=32)] * 3)
def test_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    found = float(fma(np.float32(a), np.float32(b), np.float32(c)))

    exact = Fraction(a) * Fraction(b) + Fraction(c)
    neighbours = [float(np.nextafter(np.float32(found), np.float32(end))) for end in (-np.inf, np.inf)]
    assert all(abs(Fraction(found) - exact) <= abs(Fraction(each) - exact) for each in neighbours)


def test_verdict_counts_codes_that_integer_arithmetic_changes(tmp_path: Path) -> None:
    quantized = spread(quantize(chain, same_bits(8)))
    path = export(quantized, "qdq", tmp_path / "model.onnx")

    check = check_twin(path, frozen_copy(quantized.model), images(4), STYLES["qdq"]())

    assert check is not None
    assert (check.equal, check.unlike, check.saturating) == (True, (), ())
    assert check.operators >= 3
    assert check.codes > 0
    assert check.differing < 0.05 * check.codes
    assert {each.largest for each in check.layers} <= {0, 1, 2}
    figures = check.figures()
    assert (figures["codes"], figures["differing_codes"]) == (check.codes, check.differing)
    assert len(check.per_layer()) == len(check.layers)


def test_files_without_integer_kernels_have_no_twin(tmp_path: Path) -> None:
    quantized = quantize(conv_bn, same_bits(4))
    path = export(quantized, "qdq", tmp_path / "model.onnx")

    assert check_twin(path, frozen_copy(quantized.model), images(2), STYLES["qdq"]()) is None


def test_styles_may_require_the_twin() -> None:
    """What differs is reported, and refused by a style that says so."""
    unequal = TwinCheck(images=4, operators=2, unlike=("conv",))
    verdict = Verdict(4, 1.0, 0.0, 0.0, twin=unequal)

    assert verdict.verified
    assert verdict.figures()["twin"]["equal"] is False
    verdict.equals_twin = True
    assert verdict.reasons() == ["operators on codes differ from the twin's: conv"]


def test_graphs_of_other_operators_are_skipped(tmp_path: Path) -> None:
    """Operators that the twin does not know are named; constants of them are not folded."""
    file = QdqFile((4,))
    weight = np.ones((4, 3), np.int8)
    y = file.node("Gemm", [file.quantized("x", 0.1), file.weight(weight, 0.1, None)])
    file.nodes.append(onnx.helper.make_node("Gelu", [y], ["z"], domain="com.microsoft"))
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])
    z = onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["n", 3])
    graph = onnx.helper.make_graph(file.nodes, "graph", [x], [z], file.constants)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))

    with pytest.raises(UnsupportedModel, match="the twin cannot compute Gelu"):
        Twin(path).run(np.zeros((1, 4), np.float32))


def test_linter_names_layers_and_remedy_of_saturation(tmp_path: Path) -> None:
    quantized = spread(quantize(chain, same_bits(8)))
    found = hazards(onnx.load(str(export(quantized, "qdq-vnni", tmp_path / "model.onnx"))))

    assert {hazard.node for hazard in found} <= set(quantized.layers)
    (line,) = summaries(found)
    assert line.startswith("H9 at ")
    assert found[0].node in line
    assert "7 bits" in line
    assert "UINT8" in line


def test_saturation_is_the_reason_where_it_happens(tmp_path: Path) -> None:
    """Without VNNI the layers of a saturating file are wrong, and the verdict says why; with VNNI they are right."""
    assert HERE is not None
    quantized = spread(quantize(chain, same_bits(8)))
    path = export(quantized, "qdq-vnni", tmp_path / "model.onnx")
    batches = [(images(8), torch.zeros(8, dtype=torch.long))]
    verdict = prove_graph(path, quantized.model, "qdq-vnni", batches, 1, SILENT)

    assert verdict.twin is not None
    assert verdict.twin.equal
    assert verdict.twin.saturating
    if HERE.saturates and not verdict.layerwise.passed:  # type: ignore[union-attr]
        assert any("saturate on this processor" in reason for reason in verdict.reasons())


def seven_bit_weights(names: Iterable[str]) -> dict[str, LayerBits]:
    return {name: LayerBits(weight=7, activation=8) for name in names}


def test_seven_bit_weights_cannot_saturate(tmp_path: Path) -> None:
    """Codes of -64 ... 63: two products of 255 and -64 are -32640."""
    quantized = spread(quantize(chain, seven_bit_weights, Scheme(weight_grid="zero")))
    path = export(quantized, "qdq-vnni", tmp_path / "model.onnx")
    twin = Twin(path)

    assert sum(count for op, count in twin.kernels.items() if op in ("QLinearConv", "QGemm")) >= 2
    assert twin.saturating == ()
    assert not hazards(onnx.load(str(path)))


def test_processors_are_told_apart() -> None:
    avx2 = frozenset({"sse4_1", "avx2", "fma"})

    assert Machine.here(avx2) == Machine(fused=True, saturates=True)
    assert Machine.here(avx2 | {"avx_vnni"}) == Machine(fused=True, saturates=False)
    assert Machine.here(avx2 | {"avx512f"}) == Machine(fused=True, saturates=True)
    assert Machine.here(frozenset({"sse4_1"})) == Machine(fused=False, saturates=False)
    assert Machine.here(frozenset()) is None
    assert Machine.here(frozenset({"asimd"})) is None


def test_skipped_and_unlike_checks_are_told_apart() -> None:
    assert TwinCheck(skipped="elsewhere").equal is None
    assert TwinCheck(skipped="elsewhere").failed
    assert not TwinCheck(skipped=OTHER_PROCESSOR).failed
    assert TwinCheck(unlike=("conv",)).equal is False
    assert TwinCheck(max_abs_diff=1e-6).equal is False
    assert TwinCheck(max_abs_diff=1e-6, floating=("mean",)).equal is True


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")

    with pytest.raises(CorruptArtifact, match="is not an ONNX file"):
        Twin(tmp_path / "broken.onnx")
