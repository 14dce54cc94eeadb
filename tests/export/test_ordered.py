"""Ordered arithmetic is close to PyTorch's, and ONNX Runtime computes identical values.

The latter is their purpose: no value may differ, for any input.
"""

import itertools
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import UnsupportedModel
from saqcli.export import ordered, tracing
from saqcli.export.exact_form import EXACT_ALONE, ORDERED, SCALED
from tests.support.networks import seeded
from tests.support.sweeps import sweep

EPS = 2.0**-24  # relative rounding error of one float32 operation
Function = Callable[[Tensor], Tensor]

# Extreme values of networks, and values of damaged ones.
SPECIAL = (
    0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 0.5, 1e-3, -1e-3, 1e-30, -1e-30, 1.2e-38, 1e-40, -1e-40, 1e-45, 4.0, -4.0,
    86.9, -86.9, 87.0, -87.0, 88.8, -88.8, 103.0, -103.0, 150.0, -150.0, 1e4, -1e4, 1e20, -1e20,
)  # fmt: skip


def numbers() -> Tensor:
    """Values of every magnitude and both signs."""
    with seeded(0):
        spread = torch.randn(4000) * torch.exp(torch.empty(4000).uniform_(-12, 5))
    return torch.cat([torch.tensor(SPECIAL), spread, torch.linspace(-12, 12, 4001)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Function by function: ours, PyTorch's, and what rounding allows, in units of EPS, as a function of input and truth.
POINTWISE: dict[str, tuple[Function, Function, Callable[[Tensor, Tensor], Tensor]]] = {
    "sigmoid": (ordered.sigmoid, torch.sigmoid, lambda x, y: 8 * y + 1e-29),
    "silu": (ordered.silu, F.silu, lambda x, y: 8 * y.abs() + x.abs() * 1e-29 + 1e-36),
    "tanh": (ordered.tanh, torch.tanh, lambda x, y: 8 * torch.ones_like(y)),
    "erf": (ordered.erf, torch.erf, lambda x, y: 8 * y.abs() + 1e-29),
    "gelu": (ordered.gelu, F.gelu, lambda x, y: 8 * x.abs() + 1e-29),
    "gelu_tanh": (
        lambda x: ordered.gelu(x, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x, y: (8 + 4 * x.abs().clamp_max(8)) * x.abs() + 1e-29,
    ),
    "hardsigmoid": (ordered.hardsigmoid, F.hardsigmoid, lambda x, y: 4 * torch.ones_like(y)),
    "hardswish": (ordered.hardswish, F.hardswish, lambda x, y: 4 * x.abs() + 1e-29),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_function_matches_pytorch_to_rounding(name: str) -> None:
    mine, truth, allowed = POINTWISE[name]
    x = numbers()
    found, expected = mine(x).double(), truth(x.double())

    assert found.isfinite().all()
    off = (found - expected).abs() - EPS * allowed(x.double(), expected)
    worst = int(off.argmax())
    assert float(off.max()) <= 0, (float(x[worst]), float(found[worst]), float(expected[worst]))


def test_exp_matches_pytorch_within_its_range() -> None:
    x = torch.cat([torch.linspace(-87, 87, 200001), torch.tensor([0.0, 1e-40, -1e-40, 1e-8])])
    found, expected = ordered.exp(x).double(), torch.exp(x.double())

    assert float(((found - expected).abs() / expected).max()) <= 6 * EPS
    ends = ordered.exp(torch.tensor([-88.0, -1e30, -math.inf, 88.0, 1e30, math.inf]))
    assert torch.equal(ends, ordered.exp(torch.tensor([-87.0] * 3 + [87.0] * 3)))
    assert float(ordered.exp(torch.tensor(0.0))) == 1


def test_sqrt_is_correctly_rounded() -> None:
    """Also halfway between two floats, and next to squares."""
    near = torch.arange(1, 40000, dtype=torch.float64).square().float()
    x = torch.cat([numbers().abs(), near, near * (1 + 2.0**-23), near * (1 - 2.0**-24)])
    expected = np.sqrt(x.numpy().astype(np.longdouble)).astype(np.float32)

    assert np.array_equal(ordered.sqrt(x).numpy(), expected)


def test_exp_is_monotonic() -> None:
    """Up to its rounding error."""
    x = torch.linspace(-20, 20, 100001)
    y = ordered.exp(x).double()

    assert ((y[1:] - y[:-1]) >= -4 * EPS * y[1:]).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 31, 64, 100])
@pytest.mark.parametrize("dims", [0, 1, -1, (0, 2), (0, 1, 2)])
def test_total_is_rounded_at_most_twice(size: int, dims: int | tuple[int, ...]) -> None:
    """Also under cancellation: the loss is far below the rounding of the largest term."""
    x = torch.cat([normal(size, 3, 4), -normal(size, 3, 4)], 2) * torch.exp(normal(size, 3, 8, seed=1) * 3)
    found, expected = ordered.total(x, dims).double(), x.double().sum(dims, keepdim=True)
    largest = x.double().abs().amax(dims, keepdim=True)

    assert found.shape == expected.shape
    assert ((found - expected).abs() <= EPS * expected.abs() + 2.0**-32 * largest).all()


def test_total_is_independent_of_order() -> None:
    x = normal(5, 1000)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(2))

    assert torch.equal(ordered.total(x[:, order], 1), ordered.total(x, 1))


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [None, 0, -1, [2], [2, 3], [-1, -2], [1, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("name", ["mean", "sum"])
def test_mean_and_sum_match_pytorch(name: str, dims: object, keepdim: bool) -> None:
    x = normal(3, 4, 5, 7)
    if name == "sum" and isinstance(dims, int):
        dims = [dims]
    found = ORDERED[name](x, dims, keepdim)
    expected = getattr(torch, name)(x.double(), dims, keepdim=keepdim)

    assert found.shape == expected.shape
    scale = 1.0 if name == "mean" else float(x.numel() / expected.numel())
    assert float((found.double() - expected).abs().max()) <= 24 * EPS * scale


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax(dim: int) -> None:
    x = normal(5, 7, 9) * 10
    x[0, 0] = torch.tensor([0, 1e30, -1e30, 1e4, -1e4, -math.inf, -200, 50, 90.0])
    x[1, 1] = -1e30
    found, expected = ordered.softmax(x, dim).double(), torch.softmax(x.double(), dim)

    assert float((found - expected).abs().max()) <= 16 * EPS
    assert float((found.sum(dim) - 1).abs().max()) <= 16 * EPS


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [[8], [7, 8], [5, 7, 8]])
def test_layer_norm(shape: list[int], affine: bool) -> None:
    x = normal(4, 5, 7, 8) * 3 + 1
    x[0, 0] = 2.5  # zero deviation
    weight, bias = (normal(*shape, seed=1), normal(*shape, seed=2)) if affine else (None, None)
    found = ordered.layer_norm(x, shape, weight, bias, 1e-5)
    double = [None if each is None else each.double() for each in (weight, bias)]
    expected = F.layer_norm(x.double(), shape, *double, 1e-5)
    # A constant differs from its mean by one rounding, divided by sqrt(eps).
    allowed = torch.full_like(expected, 64 * EPS * 4)
    allowed[0, 0] = (
        2.5 * 2 * EPS / math.sqrt(1e-5) * (1 if weight is None else float(weight.abs().max())) + 1e-6
    )

    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("shape", [[8], [7, 8]])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_rms_norm(shape: list[int], eps: float | None) -> None:
    x, weight = normal(4, 5, 7, 8) * 3, normal(*shape, seed=1)
    found = ordered.rms_norm(x, shape, weight, eps)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    expected = F.rms_norm(x.double(), shape, weight.double(), eps)

    assert ((found.double() - expected).abs() <= 8 * EPS * expected.abs()).all()


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(3, 6, 5, 7), (3, 6, 9), (2, 6, 2, 3, 2)])
@pytest.mark.parametrize("affine", [False, True])
def test_group_norm(shape: tuple[int, ...], groups: int, affine: bool) -> None:
    x = normal(*shape) * 2 - 1
    weight, bias = (normal(6, seed=1), normal(6, seed=2)) if affine else (None, None)
    found = ordered.group_norm(x, groups, weight, bias, 1e-5)
    double = [None if each is None else each.double() for each in (weight, bias)]

    assert float((found.double() - F.group_norm(x.double(), groups, *double, 1e-5)).abs().max()) <= 256 * EPS


@pytest.mark.parametrize("count", [1, 2, 3, 64, 1000, 2048, 2049])
@pytest.mark.parametrize("lead", [((4,), ()), ((2, 3), (2, 3)), ((3,), (3,))])
def test_matmul_keeps_bits_of_exact_sums(count: int, lead: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    rows, columns = lead
    a, b = normal(*rows, 5, count, seed=1), normal(*columns, count, 6, seed=2)
    a[..., 0, :], b[..., 1] = 0, 0
    a[..., 1, :] *= 1e-30
    a[..., 2, :] *= 1e20
    bits = min(21, (53 - math.ceil(math.log2(count))) // 2)
    sizes = [a.double().abs().amax(-1, keepdim=True), b.double().abs().amax(-2, keepdim=True)]
    allowed = (count * 2.0**-bits * 1.01 + 4 * EPS * count) * sizes[0] * sizes[1] + 1e-44

    assert ((ordered.matmul(a, b).double() - a.double() @ b.double()).abs() <= allowed).all()


def test_matmul_is_independent_of_order() -> None:
    a, b = normal(7, 500), normal(500, 9, seed=1)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(2))

    assert torch.equal(ordered.matmul(a[:, order], b[order]), ordered.matmul(a, b))
    assert torch.equal(ordered.matmul(a[:3], b[:, :4]), ordered.matmul(a, b)[:3, :4])


MASKS: dict[str, dict[str, object]] = {
    "none": {},
    "bool": {"attn_mask": torch.arange(42).reshape(6, 7) % 3 != 1},
    "float": {"attn_mask": normal(6, 7, seed=4) * 3},
    "infinite": {"attn_mask": torch.where(torch.arange(42).reshape(6, 7) % 4 == 0, -math.inf, 0.5)},
    "heads": {"attn_mask": normal(2, 3, 6, 7, seed=5) > 0.5},
    "blind": {"attn_mask": (torch.arange(42).reshape(6, 7) % 3 > 0) & (torch.arange(6) % 4 > 0)[:, None]},
    "blind_infinite": {
        "attn_mask": torch.where(torch.arange(6) % 4 > 0, 0.5, -math.inf)[:, None].expand(6, 7)
    },
    "scale": {"scale": 0.7},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention(mask: str) -> None:
    query, key, value = normal(2, 3, 6, 8), normal(2, 3, 7, 8, seed=1), normal(2, 3, 7, 4, seed=2)
    given = dict(MASKS[mask])
    if mask == "heads":
        given["attn_mask"][..., 0] = True  # type: ignore[index]  # nobody sees nothing
    found = ordered.attention(query, key, value, **given)  # type: ignore[arg-type]
    if isinstance(given.get("attn_mask"), Tensor) and given["attn_mask"].is_floating_point():  # type: ignore[attr-defined]
        given["attn_mask"] = given["attn_mask"].double()  # type: ignore[attr-defined]
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), **given)  # type: ignore[arg-type]

    assert float((found.double() - expected).abs().max()) <= 2.0**-17
    if mask.startswith("blind"):
        assert not found[:, :, ::4].any()


def test_grouped_query_attention_is_refused() -> None:
    query, key = normal(2, 4, 6, 8), normal(2, 2, 6, 8, seed=1)
    with pytest.raises(UnsupportedModel, match=r"grouped queries: choose another `style`"):
        ordered.attention(query, key, key, enable_gqa=True)


POOLS = [
    {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "ceil_mode": ceil_mode,
        "count_include_pad": include,
        "divisor_override": divisor,
    }
    for kernel, stride, padding, ceil_mode, include, divisor in itertools.product(
        ((2, 2), (3, 3), (3, 2)),
        ((), (1, 1), (2, 2), (3, 1)),
        ((0, 0), (1, 1)),
        (False, True),
        (False, True),
        (None, 5),
    )
]


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (4, 9)])
def test_average_pools_2d(size: tuple[int, int]) -> None:
    x = normal(2, 3, *size)
    for options in POOLS:
        found = ORDERED["avg_pool2d"](x, **options)
        expected = F.avg_pool2d(x.double(), **options)

        assert found.shape == expected.shape, options
        assert float((found.double() - expected).abs().max()) <= 16 * EPS * 4, options


@pytest.mark.parametrize("target", [(1, 1), (2, 2), (3, 3), (4, 3), (7, 5), (2, 5), (9, 9)])
def test_adaptive_average_pools_2d(target: tuple[int, int]) -> None:
    x = normal(2, 3, 7, 5)
    found, expected = ORDERED["adaptive_avg_pool2d"](x, target), F.adaptive_avg_pool2d(x.double(), target)

    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= 16 * EPS * 4


@pytest.mark.parametrize("length", [6, 7])
def test_average_pools_1d(length: int) -> None:
    x = normal(2, 3, length)
    for kernel, stride, padding, ceil_mode, include in itertools.product(
        ([2], [3]), ([], [1], [2]), ([0], [1]), (False, True), (False, True)
    ):
        options = (kernel, stride, padding, ceil_mode, include)
        found, expected = ORDERED["avg_pool1d"](x, *options), F.avg_pool1d(x.double(), *options)

        assert found.shape == expected.shape, options
        assert float((found.double() - expected).abs().max()) <= 16 * EPS * 4, options


@pytest.mark.parametrize("target", [1, 2, 3, 7, 9])
def test_adaptive_average_pools_1d(target: int) -> None:
    x = normal(2, 3, 7)
    found, expected = ORDERED["adaptive_avg_pool1d"](x, [target]), F.adaptive_avg_pool1d(x.double(), target)

    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= 16 * EPS * 4


def test_tanh_near_zero_is_precise() -> None:
    """On both sides of the switch at 0.1, where a difference would cancel and a series would end too early."""
    x = torch.cat([torch.logspace(-6, 0, 4001), torch.linspace(0.0999, 0.1001, 4001)])
    x = torch.cat([x, -x])
    error = (ordered.tanh(x).double() - x.double().tanh()).abs() / x.double().tanh().abs()

    assert float(error.max()) <= 40 * EPS
    assert float(error[x.abs() < 0.01].max()) <= 4 * EPS


@pytest.mark.parametrize("exponent", [-0.5, 0.5, 1, 2, 3.0, 8])
def test_powers(exponent: float) -> None:
    x = numbers().abs().clamp(1e-4, 1e4)
    expected = x.double() ** exponent

    assert float(((ORDERED["pow"](x, exponent).double() - expected).abs() / expected).max()) <= 8 * EPS


@pytest.mark.parametrize(
    ("name", "argument"), [("pow", 1.5), ("pow", -1), ("pow", 9), ("linalg_vector_norm", 1)]
)
def test_operator_without_ordered_form_is_named(name: str, argument: float) -> None:
    with pytest.raises(UnsupportedModel):
        ORDERED[name](torch.ones(3), argument)


def test_norm_and_rsqrt() -> None:
    x = normal(4, 9)
    expected = torch.linalg.vector_norm(x.double(), 2, [1], keepdim=True)

    assert torch.allclose(ORDERED["linalg_vector_norm"](x, 2, [1], True).double(), expected, rtol=16 * EPS)
    assert torch.allclose(ORDERED["rsqrt"](x.abs()).double(), x.abs().double().rsqrt(), rtol=4 * EPS)


# ONNX Runtime, at its default optimizations.

WEIGHT, BIAS = normal(6, seed=11), normal(6, seed=12)
LAYER_WEIGHT, LAYER_BIAS = normal(5, seed=13), normal(5, seed=14)
CONVERTED: dict[str, Function] = {
    **{name: functions[0] for name, functions in POINTWISE.items()},
    "exp": ordered.exp,
    "softmax": lambda x: ordered.softmax(x, -1),
    "softmax_1": lambda x: ordered.softmax(x, 1),
    "layer_norm": lambda x: ordered.layer_norm(x, [5], LAYER_WEIGHT, LAYER_BIAS, 1e-5),
    "group_norm": lambda x: ordered.group_norm(x, 3, WEIGHT, BIAS, 1e-5),
    "rms_norm": lambda x: ordered.rms_norm(x, [5], LAYER_WEIGHT, 1e-5),
    "matmul": lambda x: ordered.matmul(x, x.transpose(-2, -1)),
    "attention": lambda x: ordered.attention(x, x * 0.5, x + 1.0),
    "masked": lambda x: ordered.attention(x, x, x, torch.ones(7, 7).tril().bool()),
    "blind": lambda x: ordered.attention(x, x, x, torch.ones(7, 7).tril(-1).bool()),
    "blind_infinite": lambda x: ordered.attention(x, x, x, torch.full((7, 7), -math.inf).triu()),
    "causal": lambda x: ordered.attention(x, x, x, is_causal=True),
    "mean": lambda x: ordered.mean(x, [2, 3], keepdim=True),
    "sum": lambda x: ORDERED["sum"](x, [1]),
    "norm": lambda x: ORDERED["linalg_vector_norm"](x, 2, [1], True),
    "pow": lambda x: ORDERED["pow"](x, 3.0),
    "root": lambda x: ORDERED["pow"](x * x, 0.5),
    "inverse_root": lambda x: ORDERED["pow"](x * x + 1.0, -0.5),
    "rsqrt": lambda x: ORDERED["rsqrt"](x * x + 1.0),
    "average": lambda x: ORDERED["avg_pool2d"](x, (2, 2)),
    "average_padded": lambda x: ORDERED["avg_pool2d"](x, (3, 3), (2, 2), (1, 1)),
    "average_inside": lambda x: ORDERED["avg_pool2d"](x, (3, 3), (1, 1), (1, 1), False, False),
    "average_ceil": lambda x: ORDERED["avg_pool2d"](x, (3, 3), (2, 2), (0, 0), True),
    "average_line": lambda x: ORDERED["avg_pool1d"](x.flatten(2), [3], [2], [1]),
    "adaptive_line": lambda x: ORDERED["adaptive_avg_pool1d"](x.flatten(2), [3]),
    "adaptive": lambda x: ORDERED["adaptive_avg_pool2d"](x, (3, 2)),
    "global": lambda x: ORDERED["adaptive_avg_pool2d"](x, (1, 1)),
}


# Unchanged in the exact form: one IEEE 754 operation in PyTorch and in ONNX Runtime.
ALONE: dict[str, Function] = {
    "add": lambda x: x + x.flip(1),
    "sub": lambda x: x - 0.3,
    "rsub": lambda x: 0.7 - x,
    "mul": lambda x: x * 0.1,
    "div": lambda x: x / (x * x + 1.0),
    "divided": lambda x: x / 0.7,
    "reciprocal": lambda x: torch.reciprocal(x + 0.3),
    "square": torch.square,
    "abs": torch.abs,
    "neg": torch.neg,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "clamp": lambda x: x.clamp(-0.3, 0.7),
    "clamp_min": lambda x: x.clamp_min(0.2),
    "hardtanh": lambda x: F.hardtanh(x, -0.2, 0.9),
    "maximum": lambda x: torch.maximum(x, x.flip(2)),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (1, 1)),
    "amax": lambda x: x.amax((2, 3)),
    "amin": lambda x: x.amin(1),
    "floor": lambda x: torch.floor(x * 3.0),
    "ceil": lambda x: torch.ceil(x * 3.0),
    "round": lambda x: torch.round(x * 2.0),
    "where": lambda x: torch.where(x > 0.1, x, x * 2.0),
    "masked_fill": lambda x: x.masked_fill(x < 0.1, -1.0),
    "upsample_nearest2d": lambda x: F.interpolate(x, scale_factor=2),
    "upsample_to": lambda x: F.interpolate(x, size=(10, 9)),
    **{
        f"{name}_scaled": (lambda x, scaled=scaled: scaled(x, x.flip(1), 0.3))
        for name, scaled in SCALED.items()
    },
}
CONVERTED |= ALONE


class SideBySide(nn.Module):
    """All functions of one image, concatenated."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([CONVERTED[name](x).flatten(1) for name in self.names], 1)


def test_exceptions_are_in_the_table() -> None:
    others = {"divided", "upsample_to", *(f"{name}_scaled" for name in SCALED)}

    assert set(ALONE) - others <= EXACT_ALONE
    assert not EXACT_ALONE & set(ORDERED)


# Slow to export: these have hundreds of operations, all of them covered by others.
LONG = {"masked", "blind", "causal", "softmax_1", "adaptive_line", "average_ceil"}
SHORT = [name for name in CONVERTED if name not in LONG]


@pytest.fixture(scope="module", params=sweep([SHORT, list(CONVERTED)], lambda names: names is SHORT), ids=len)
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """Functions in one ONNX file."""
    path = tmp_path_factory.mktemp("ordered") / "ordered.onnx"
    ir.save(tracing.onnx_graph(SideBySide(request.param), normal(2, 6, 7, 5)), path)
    return request.param, path


def inputs(kind: str, count: int) -> Tensor:
    """Images (count, 6, 7, 5)."""
    if kind == "normal":
        return normal(count, 6, 7, 5, seed=count)
    if kind == "wide":
        return normal(count, 6, 7, 5, seed=count) * torch.exp(normal(count, 6, 7, 5, seed=9) * 4)
    if kind == "zeros":
        return torch.zeros(count, 6, 7, 5)
    # Attention multiplies three of them: what overflows float32 is NaN in both.
    special = torch.tensor([each for each in SPECIAL if abs(each) <= 1e4])
    repeated = special.repeat(math.ceil(count * 210 / len(special)))
    return repeated[: count * 210].reshape(count, 6, 7, 5)


@cache
def expected_of(kind: str, count: int) -> dict[str, Tensor]:
    """The result of PyTorch."""
    x = inputs(kind, count)
    return {name: function(x).flatten(1) for name, function in CONVERTED.items()}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("kind", ["normal", "wide", "zeros", "special"])
def test_onnx_runtime_matches_pytorch(
    kind: str, level: str, threads: int, converted: tuple[list[str], Path]
) -> None:
    names, path = converted
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for count in (1, 2, 5, 16):
        (found,) = session.run(None, {tracing.INPUT: inputs(kind, count).numpy()})
        start = 0
        for name in names:
            expected = expected_of(kind, count)[name]
            mine = torch.from_numpy(found[:, start : start + expected.shape[1]])
            start += expected.shape[1]
            same = (mine == expected) | (mine.isnan() & expected.isnan())
            assert same.all(), (name, count, mine[~same][:3], expected[~same][:3])
        assert start == found.shape[1]
