"""The exact form equals the model, and ONNX Runtime reproduces it bit for bit in every configuration."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import UnsupportedModel
from saqcli.export.exact_form import ExactForm
from saqcli.export.operators import frozen_copy
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.random_state import torch_threads
from saqcli.verify.layerwise import check_layers
from saqcli.verify.runtime import onnx_session
from saqcli.verify.verdict import judge
from tests.support.networks import CLASSES, NETWORKS, Quantized, Tokens, images, quantize
from tests.support.onnx_files import answer, export, graph_of, network, set_gains, told
from tests.support.sweeps import sweep

CLIP, LSQ, OFFSETS, OFFSETS_ZERO = (
    ("clip", "paper"),
    ("lsq", "zero"),
    ("lsq_plus", "paper"),
    ("lsq_plus", "zero"),
)
SCHEMES = sweep(
    [
        *((name, *scheme) for name in NETWORKS for scheme in (CLIP, OFFSETS_ZERO)),
        *((name, *scheme) for name in ("conv_bn", "token_mlp") for scheme in (LSQ, OFFSETS)),
    ],
    lambda name, *scheme: name in ("attention", "standardized", "transposed") and scheme == OFFSETS_ZERO,
    # others are below
)
BATCHES = (1, 2, 5, 16)


def check_bits(quantized: Quantized, path: Path) -> ExactForm:
    """Check that every way to run the file matches the exact form in every batch, and the form the model."""
    export(quantized, "exact", path)
    form = ExactForm(frozen_copy(quantized.model), images(2)).eval()
    x = images(16, seed=8)
    truth = answer(form, x)
    for threads in (1, 2):
        runs = {each: onnx_session(path, optimized=each, threads=threads) for each in (False, True)}
        for count in BATCHES:
            with torch_threads(threads):
                assert torch.equal(answer(form, x[:count]), truth[:count]), (count, threads)
            for optimized, run in runs.items():
                assert torch.equal(run(x[:count]), truth[:count]), (count, threads, optimized)
    assert check_layers(path, frozen_copy(quantized.model), x[:8]).passed
    many = images(128, seed=9)
    assert judge(answer(quantized.model.double(), many.double()).float(), answer(form, many)).verified
    quantized.model.float()
    return form


@pytest.mark.parametrize(("name", "quantizer", "grid"), SCHEMES)
def test_onnx_runtime_matches_bit_for_bit(name: str, quantizer: str, grid: str, tmp_path: Path) -> None:
    scheme = Scheme(quantizer=quantizer, weight_grid=grid)  # type: ignore[arg-type]
    check_bits(quantize(NETWORKS[name], scheme=scheme), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["paper", "zero"])
def test_every_layer_and_bit_width_matches(grid: str, tmp_path: Path) -> None:
    check_bits(network("bank", grid), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("name", "granularity"),
    sweep(
        ((name, kind) for name in ("conv_bn", "residual", "depthwise") for kind in ("channel", "tensor")),
        lambda name, kind: (name, kind) == ("depthwise", "channel"),
    ),
)
def test_negative_and_zero_gains_are_folded(name: str, granularity: str, tmp_path: Path) -> None:
    quantized = quantize(NETWORKS[name], scheme=Scheme(granularity=granularity))  # type: ignore[arg-type]
    set_gains(quantized.model)
    path = tmp_path / "model.onnx"
    check_bits(quantized, path)

    assert "BatchNormalization" not in {node.op_type for node in graph_of(path).node}


def one_channel() -> nn.Module:
    """A single output channel: its scalar scale could be merged into the matrix product by ONNX Runtime."""
    return nn.Sequential(
        Tokens(), nn.Linear(3, 4), nn.Linear(4, 1, bias=False), nn.Flatten(), nn.Linear(36, 1, bias=False)
    )


@pytest.mark.parametrize("granularity", sweep(["channel", "tensor"], lambda kind: kind == "tensor"))
def test_single_output_channel_is_exact(granularity: str, tmp_path: Path) -> None:
    quantized = quantize(one_channel, scheme=Scheme(granularity=granularity))  # type: ignore[arg-type]
    path = export(quantized, "exact", tmp_path / "model.onnx")
    form = ExactForm(frozen_copy(quantized.model), images(2)).eval()
    x = images(16, seed=8)
    for count in BATCHES:
        assert torch.equal(onnx_session(path, optimized=True)(x[:count]), answer(form, x[:count]))


class BetweenNorms(nn.Module):
    """Batch norms over 2-D and 3-D tensors, before and after other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(Tokens(), nn.Linear(3, 8), nn.ReLU())
        self.over = nn.BatchNorm1d(8)
        self.last = nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.over(self.first(x).transpose(1, 2)).mean(2))
        return logits


class Arithmetic(nn.Module):
    """Arithmetic between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4 * 9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x), self.two(x)
        y = torch.add(a, b, alpha=0.3) - torch.sub(b, a, alpha=1.7) / 3.0
        y = torch.where(y > 0, y, 0.1 * y) + torch.sqrt(b * b + 0.25) * torch.exp(-a.abs())
        y = y / y.norm(dim=1, keepdim=True).clamp_min(1e-6) + torch.rsqrt(1.0 + b**2)
        first, second = y.chunk(2, 1)
        y = torch.cat([first, second.flip(2), torch.tanh(first)], 1)[:, :4]
        logits: Tensor = self.head(F.avg_pool2d(y, 3, 2, 1, count_include_pad=False).flatten(1))
        return logits


class Shared(nn.Module):
    """A layer called twice, and codes that are reshaped before the product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(16 * 9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.twice(torch.relu(self.stem(x))))
        y = F.pixel_unshuffle(F.pad(self.twice(y), (0, 0)), 2)
        logits: Tensor = self.head(y.flatten(1))
        return logits


CASES: dict[str, Callable[[], nn.Module]] = {
    "norms": BetweenNorms,
    "arithmetic": Arithmetic,
    "shared": Shared,
    "last_layer_norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 7), nn.LayerNorm(7)),
    "last_softmax": lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 7), nn.Softmax(1)),
    "last_conv": lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AvgPool2d(4), nn.Flatten()),
    "conv1d": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(3, 4, 3),
        nn.ReLU(),
        nn.BatchNorm1d(4),
        nn.Conv1d(4, 2, 3),
        nn.BatchNorm1d(2),
        nn.Flatten(),
    ),
    "same": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.SiLU(), nn.Flatten(), nn.Linear(144, 5)
    ),
}


@pytest.mark.parametrize(
    "case", sweep(CASES, lambda case: case in ("norms", "arithmetic", "shared", "conv1d"))
)
def test_operations_between_layers_are_exact(case: str, tmp_path: Path) -> None:
    check_bits(quantize(CASES[case], scheme=Scheme(quantizer="lsq_plus")), tmp_path / "model.onnx")


def test_float_linear_layer_is_exact(tmp_path: Path) -> None:
    """Its product is computed with 21-bit integers."""
    float_layer = LayerBits(weight=None, activation=None)
    quantized = quantize(
        NETWORKS["token_mlp"],
        lambda names: {
            n: LayerBits(weight=4, activation=4) if k else float_layer for k, n in enumerate(names)
        },
    )
    check_bits(quantized, tmp_path / "model.onnx")


def test_odd_4_bit_codes_pack_into_int4(tmp_path: Path) -> None:
    quantized = quantize(
        NETWORKS["conv_bn"],
        lambda names: {n: LayerBits(weight=4, activation=4) for n in names},
        Scheme(weight_grid="paper"),
    )
    path = tmp_path / "model.onnx"
    check_bits(quantized, path)
    graph = onnx.load(str(path)).graph
    stored = {each.name: each.data_type for each in graph.initializer if each.name.endswith(".codes")}

    assert stored == {f"{name}.codes": onnx.TensorProto.INT4 for name in quantized.layers}
    halves = [node for node in graph.node if told(node).get("saq.operand") == "weight"]
    assert sorted(node.op_type for node in halves) == ["Add"] * 3 + ["DequantizeLinear"] * 3


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "groups"),
    [(64, 28, 3, 1), (128, 14, 3, 1), (96, 14, 3, 96), (32, 30, 5, 2), (3, 64, 7, 1)],
)
def test_integer_convolutions_are_exact(
    channels: int, size: int, kernel: int, groups: int, batch: int, threads: int
) -> None:
    """No algorithm that transforms the codes, such as Winograd, is chosen."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(0, 16, (batch, channels, size, size), generator=generator).float()
    shape = (64 if groups == 1 else channels, channels // groups, kernel, kernel)
    weight = torch.randint(-7, 8, shape, generator=generator).float()
    with torch_threads(threads):
        found = F.conv2d(x, weight, None, 1, kernel // 2, groups=groups)
    expected = F.conv2d(x.double(), weight.double(), None, 1, kernel // 2, groups=groups)

    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(64, 5)),
            "softplus",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU(), nn.Flatten(), nn.Linear(64, 5)), "elu"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Flatten(), nn.Linear(64, 5)),
            "norm",
        ),
        (
            lambda: nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 4, 3), nn.Flatten()
            ),
            "bilinear",
        ),
    ],
)
def test_operator_without_exact_form_is_refused(make: Callable[[], nn.Module], named: str) -> None:
    quantized = quantize(make)
    with pytest.raises(UnsupportedModel, match=named) as refusal:
        ExactForm(frozen_copy(quantized.model), images(2))
    assert "choose another `style`" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_batch_size_is_dynamic() -> None:
    form = ExactForm(frozen_copy(network("standardized").model), images(1)).eval()
    x = images(33, seed=3)

    assert np.array_equal(answer(form, x)[:5].numpy(), answer(form, x[:5]).numpy())
