"""Short steps: sums that are exact in float32 in any order, in every quantizer, file and graph."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import saqcli as saq
from saqcli.quant.convert import Scheme
from saqcli.quant.kernels.use import use_kernels
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers import QUANTIZERS, Quantizer
from saqcli.quant.short_steps.absorb import absorb_norms, absorbed_norms
from saqcli.quant.short_steps.rounding import bits_that_fit, lowest_bit, nearby, neighbours, rounded
from saqcli.verify.exactness import inexact_places


def significant_bits(values: Tensor) -> int:
    return max(int(np.log2(abs(value) / lowest_bit(value))) + 1 for value in values.flatten().tolist())


@given(
    w=st.integers(2, 8),
    x=st.integers(2, 8),
    fan_in=st.sampled_from([1, 9, 27, 64, 576, 4608]),
    most=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_sums_are_exact_in_any_order_where_bits_fit(
    w: int, x: int, fan_in: int, most: int, seed: int
) -> None:
    codes_w, codes_x = 2**w - 1, 2**x - 1
    bits_w, bits_x = bits_that_fit(codes_w, codes_x, fan_in, most)
    fits = (2**bits_w - 1) * (2**bits_x - 1) * codes_w * codes_x * fan_in <= 2**24
    assert fits or (bits_w, bits_x) == (1, 1)
    assert max(bits_w, bits_x) <= most
    if not fits:
        return
    rng = np.random.default_rng(seed)
    step_w, step_x = (
        float(rounded(torch.tensor(float(rng.uniform(1e-4, 10.0))), bits)) for bits in (bits_w, bits_x)
    )
    of_w = rng.integers(-codes_w, codes_w + 1, fan_in)
    of_x = rng.integers(0, codes_x + 1, fan_in)
    if rng.random() < 0.3:  # the worst case
        of_w, of_x = np.full(fan_in, codes_w), np.full(fan_in, codes_x)
    products = (np.float32(step_w) * of_w.astype(np.float32)) * (np.float32(step_x) * of_x.astype(np.float32))
    truth = np.sum(of_w * of_x) * (step_w * step_x)
    for _ in range(3):
        total = np.float32(0)
        for product in rng.permutation(products):
            total = np.float32(total + product)
        assert float(total) == truth


@given(st.floats(1e-6, 1e6), st.integers(1, 8))
def test_rounding_of_a_step(step: float, bits: int) -> None:
    x = torch.tensor(step)
    found, (below, above) = rounded(x, bits), neighbours(x, bits)
    assert significant_bits(found[None]) <= bits
    assert below <= x <= above
    assert found in (below, above)
    assert torch.equal(rounded(found, bits), found)
    assert abs(found - x) <= min(x - below, above - x)


@given(st.floats(1e-6, 1e6), st.integers(1, 8))
def test_short_steps_around_a_step_follow_each_other(step: float, bits: int) -> None:
    found = torch.stack(nearby(torch.tensor(step), bits)).sort().values
    assert significant_bits(found) <= bits
    assert found[2] <= torch.tensor(step) <= found[3]
    assert all(torch.equal(neighbours(one, bits)[1], two) for one, two in pairwise(found))


def test_channels_far_below_the_largest_keep_their_steps() -> None:
    assert rounded(torch.tensor([1.0, 2.0**-20]), 3).tolist() == [1.0, 2.0**-20]


class Spread(nn.Module):
    """A depthwise convolution whose channels differ by 2**12, one of them dead; its norm undoes the difference."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.norm.weight.data = torch.logspace(0, -12, 8, 2)
        self.norm.bias.data.fill_(2.0**-14)
        self.norm.weight.data[7], self.norm.bias.data[7] = 1e-9, 3.0
        self.next, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm(self.depthwise(nn.functional.relu(self.stem(x)))))
        return self.fc(nn.functional.relu6(self.next(x)).mean((2, 3)))  # type: ignore[no-any-return]


@torch.no_grad()
def test_steps_of_channels_may_lie_far_apart(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = Spread().eval()
    errors = []
    for bits in (None, 3):
        seen: list[Tensor] = []
        model = quantized(network, short_steps=bits)
        model.norm.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        model(IMAGES)
        exact = network.norm(network.depthwise(network.stem(IMAGES).relu()))
        errors.append((seen[0] - exact).square().mean((0, 2, 3)) / exact.var((0, 2, 3), correction=0))
    assert (errors[1][:7] < 2 * errors[0][:7] + 0.01).all()  # the dead channel has no variance
    _, verdict = exported(model, tmp_path / "m.onnx")
    assert verdict["exact_by_construction"] is True


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if QUANTIZERS[name].activation])
@pytest.mark.parametrize("operand", ["weight", "activation", "normalized"])
def test_every_quantizer_has_short_steps(name: str, operand: str) -> None:
    kind: type[Quantizer] | None = getattr(QUANTIZERS[name], operand)
    if kind is None:
        pytest.skip("no such class")
    weights = operand != "activation"
    shape = (6, 1, 1, 1) if weights else ()
    grid = kind.weight_grid(4, kind.weight_grids[0]) if weights else kind.activation_grid(4, signed=True)
    quantizer = kind({4: grid}, shape)
    x = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    quantizer.fit(x.detach())
    exact = quantizer(x).detach()
    quantizer.step_bits = 3
    quantizer.settle(x.detach())
    found = quantizer(x)
    plain, weight = quantizer.fold(x.detach())
    assert significant_bits(plain.step().detach()) <= 3
    assert torch.equal(plain.step() * plain.codes(weight), found)
    assert torch.equal(plain(weight), found)
    assert (found - x).square().mean() < 1.3 * (exact - x).square().mean()
    found.square().sum().backward()
    trained = [parameter.grad for parameter in quantizer.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in [x.grad, *trained])
    if use_kernels(quantizer, "fused").kind == "fused":
        assert torch.equal(quantizer(x), found)


class Residual(nn.Module):
    """Convolutions with norms, one of them with an activation, a residual addition and a mean over 16 values."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import BatchNormAct2d

        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), BatchNormAct2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv4, self.norm4 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)
        for norm in (self.norm1, self.norm2, self.norm3, self.norm4):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, -1, 2)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        x = x + self.norm2(self.conv2(x))
        x = nn.functional.relu6(self.norm3(self.conv3(x)))
        y = self.conv4(x)
        x = nn.functional.relu6(self.norm4(y) + y)  # the norm is not the only reader
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


IMAGES = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def test_norms_are_absorbed_where_nothing_else_reads_the_layer(network: nn.Module) -> None:
    from saqcli.quant import convert

    before = network(IMAGES)
    convert.wrap(network)
    found = absorb_norms(network, IMAGES[:1])
    assert found == {"norm1": "conv1", "norm2": "conv2", "norm3": "conv3"} == absorbed_norms(network)
    assert torch.allclose(network(IMAGES), before, atol=1e-5)
    assert not any("norm1" in name or "norm2" in name for name in network.state_dict())
    assert isinstance(network.norm4, nn.BatchNorm2d)


def quantized(network: nn.Module, **more: object) -> nn.Module:
    return saq.quantize_model(network, 4, calibration=[IMAGES], **more).eval()  # type: ignore[arg-type]


@torch.no_grad()
def test_corrections_reach_absorbed_norms(network: nn.Module) -> None:
    truth = network(IMAGES)
    errors = []
    for norms in (False, True):
        model = quantized(network, short_steps=8, recalibrate_bn=norms)
        errors.append((model(IMAGES) - truth).square().mean())
    assert errors[1] < 0.7 * errors[0]


def test_biases_lie_on_the_grid_of_the_sums(network: nn.Module) -> None:
    for layer in quantized_layers(quantized(network, short_steps=3)).values():
        bias, unit = layer.quantized_bias(), layer.unit_of_sums()
        if bias is not None and unit is not None:
            assert torch.equal((bias / unit).round() * unit, bias)


def test_a_file_of_tensors_gives_the_same_bits(network: nn.Module, tmp_path: Path) -> None:
    model = quantized(network, short_steps=3)
    saq.save(model, tmp_path / "model.safetensors")
    loaded = saq.load(tmp_path / "model.safetensors", model=Residual())
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert saq.info(loaded).quantization.scheme.short_steps == 3


def exported(model: nn.Module, path: Path, style: str = "qdq") -> tuple[onnx.ModelProto, dict[str, object]]:
    saq.export_onnx(model, path, style=style, verify=[IMAGES])
    return onnx.load(str(path)), json.loads(path.with_suffix(".verdict.json").read_text())


class Plain(Residual):
    """The same without a second reader of a layer with a norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        x = x + self.norm2(self.conv2(x))
        x = nn.functional.relu6(self.norm3(self.conv3(x)))
        x = nn.functional.relu6(self.norm4(self.conv4(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Joined(Residual):
    """Additions whose sum is quantized, with and without ReLU, a pool of some positions, and a mean."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        x = nn.functional.relu(x + self.norm2(self.conv2(x)))
        x = nn.functional.avg_pool2d(nn.functional.relu(self.norm3(self.conv3(x))), 2)
        x = x + self.norm4(self.conv4(x))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_quantized_junctions_are_exact_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantized(Joined().eval(), short_steps=3, junctions=("add", "pool"))
    graph, verdict = exported(model, tmp_path / "m.onnx")
    assert (verdict["exact_by_construction"], verdict["max_abs_diff"], verdict["inexact"]) == (True, 0, [])
    added = [node for node in graph.graph.node if node.op_type == "Max"]
    assert len(added) == 3  # two additions and a pool
    for quantizer in model.modules():
        if isinstance(quantizer, Quantizer):
            assert significant_bits(quantizer.step().detach()) <= 3


def test_layers_that_share_a_quantizer_take_the_fewest_bits() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 64, 1), nn.Linear(8, 5)
            self.wide, self.narrow = nn.Conv2d(64, 8, 3, padding=1), nn.Conv2d(64, 8, 1, groups=8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.fc((self.wide(x) + self.narrow(x)).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = saq.quantize_model(Fork().eval(), 6, calibration=[IMAGES], short_steps=8, junctions=("add",))
    wide, narrow = model.wide, model.narrow
    assert wide.input_quantizer is narrow.input_quantizer
    _, most = bits_that_fit(63, 63, 64 * 9, 8)
    assert narrow.input_quantizer.step_bits == most < bits_that_fit(63, 63, 8, 8)[1]


def test_a_graph_is_proved_bit_equal(network: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantized(Plain().eval(), short_steps=3)
    graph, verdict = exported(model, tmp_path / "m.onnx")
    assert verdict["exact_by_construction"] is True
    assert verdict["max_abs_diff"] == 0
    assert verdict["inexact"] == []
    graph, verdict = exported(quantized(Plain().eval()), tmp_path / "n.onnx")
    assert "exact_by_construction" not in verdict
    places = inexact_places(graph)
    assert {"conv1", "conv2", "conv3"} & {place.layer for place in places}


def test_a_norm_that_is_left_is_named(network: nn.Module, tmp_path: Path) -> None:
    _, verdict = exported(quantized(network, short_steps=3), tmp_path / "m.onnx")
    assert verdict["exact_by_construction"] is False
    assert [place["layer"] for place in verdict["inexact"]] == ["conv4"]  # type: ignore[attr-defined]


def test_without_short_steps_nothing_is_recorded(network: nn.Module, tmp_path: Path) -> None:
    assert "short_steps" not in json.loads(Scheme().model_dump_json())
    assert json.loads(Scheme(short_steps=2).model_dump_json())["short_steps"] == 2
    model = quantized(network)
    assert not absorbed_norms(model)
    graph, _ = exported(model, tmp_path / "m.onnx")
    facts = {entry.key: entry.value for entry in graph.metadata_props}["saq.facts"]
    assert "absorbed" not in facts
