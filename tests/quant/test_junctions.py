"""Quantized junctions: found, redirected, one quantizer for every tensor, and all that is done with quantizers."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import saqcli as saq
from saqcli.errors import ConfigError, CorruptArtifact, UnsupportedModel
from saqcli.quant import convert
from saqcli.quant.junctions.kinds import KINDS, SHARED
from saqcli.quant.junctions.quantized import QuantizedJunction, quantized_junctions
from saqcli.quant.junctions.sharing import activation_places, owners
from saqcli.quant.layer import quantized_layers
from saqcli.quant.network import Network, trace_network
from saqcli.quant.quantizers import Quantizer
from saqcli.quant.routing import RoutedParent
from saqcli.reconstruction.blocks import find_blocks
from tests.support import tiny

ALL = tuple(kind for kind in KINDS if kind != SHARED)
SIZE = (3, 8, 8)


def conv(c_in: int = 3, c_out: int = 6) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class Net(nn.Module):
    """A stem, a function of its output x and of two convolutions a and b, a head."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], channels: int = 6) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(), conv(6, 6), conv(6, 6)
        self.body, self.head = body, nn.Linear(channels, tiny.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self, F.relu(self.stem(images))).flatten(2).amax(-1))


def built(body: Callable[[Any, Tensor], Tensor], channels: int = 6) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(body, channels).eval(), tiny.images(SIZE, 4)


def traced(net: nn.Module, x: Tensor, junctions: tuple[str, ...] = ALL) -> Network:
    convert.wrap(net)
    return trace_network(net, x[:1], "tiny", junctions=junctions)


def found(body: Callable[[Any, Tensor], Tensor], channels: int = 6) -> dict[str, str]:
    """Kinds of the junctions of ``body`` by name."""
    junctions = traced(*built(body, channels)).junctions
    assert junctions is not None
    return {name: operands.kind for name, operands in junctions.operators.items()}


def quantized(
    body: Callable[[Any, Tensor], Tensor],
    bits: int | str = 8,
    junctions: tuple[str, ...] = ALL,
    channels: int = 6,
) -> tuple[nn.Module, Tensor]:
    net, x = built(body, channels)
    return saq.quantize_model(net, bits, calibration=[x], junctions=junctions), x


def on_grid(quantizer: Any, x: Tensor) -> Tensor:
    step, grid = quantizer.step().double(), quantizer.grid()
    return (x.double() / step).round().clamp(grid.lowest, grid.highest) * step


# Found


def iadd(net: Any, x: Tensor) -> Tensor:
    out = net.a(x)
    out += x
    return out


def add_in_place(net: Any, x: Tensor) -> Tensor:
    out = net.a(x)
    out.add_(x)
    return out


ADDITIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plus": lambda net, x: net.a(x) + x,
    "function": lambda net, x: torch.add(net.a(x), x),
    "by_name": lambda net, x: torch.add(input=net.a(x), other=x),
    "method": lambda net, x: net.a(x).add(x),
    "in_place": iadd,
    "method_in_place": add_in_place,
}


def gated(net: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(net.a(x.mean((2, 3), keepdim=True)))


OTHERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "subtraction": (lambda net, x: net.a(x) - x, ["add"]),
    "concatenation": (lambda net, x: torch.cat([net.a(x), net.b(x)], 1).chunk(2, 1)[0], ["concat"]),
    "by_name": (lambda net, x: torch.cat(tensors=(net.a(x), x), dim=1)[:, :6], ["concat"]),
    "gate": (gated, ["pool", "sigmoid", "mul"]),
    "pool": (lambda net, x: F.avg_pool2d(net.a(x), 2), ["pool"]),
    "adaptive": (lambda net, x: F.adaptive_avg_pool2d(net.a(x), 1), ["pool"]),
    "mean": (lambda net, x: net.a(x).mean([2, 3], keepdim=True), ["pool"]),
    "silu": (lambda net, x: F.silu(net.a(x), inplace=True), ["silu"]),
    "hardswish": (lambda net, x: F.hardswish(net.a(x), True), ["hardswish"]),
    "hardsigmoid": (lambda net, x: F.hardsigmoid(net.a(x)), ["hardsigmoid"]),
    "square": (lambda net, x: x * x, ["mul"]),
    # none of these is a junction
    "bias": (lambda net, x: net.a(x) + net.b.bias[:, None, None], []),
    "scale": (lambda net, x: 2 * net.a(x) * net.b.bias[:, None, None] + 1, []),
    "constant_side": (
        lambda net, x: torch.cat([x, net.b.weight[:1, :, :1, :1].expand(len(x), 6, 8, 8)], 1)[:, :6],
        [],
    ),
    "mean_of_channels": (lambda net, x: net.a(x) - 0 * net.b.bias.mean(), []),
    "shapes": (lambda net, x: net.a(x)[..., : x.shape[-1] // 2 + 1], []),
}


@pytest.mark.parametrize("way", ADDITIONS)
def test_additions_are_found_in_every_spelling(way: str) -> None:
    assert found(ADDITIONS[way]) == {"junctions.0": "add"}


@pytest.mark.parametrize("way", OTHERS)
def test_kinds_are_found_and_constants_make_no_junction(way: str) -> None:
    body, kinds = OTHERS[way]
    assert list(found(body).values()) == kinds


def test_only_chosen_kinds_are_quantized() -> None:
    net, x = built(gated)
    junctions = traced(net, x, ("mul",)).junctions
    assert junctions is not None
    assert list(junctions.operators) == ["junctions.2"]
    assert list(quantized_junctions(net)) == ["junctions.2"]


def test_unknown_kinds_are_refused() -> None:
    net, x = built(gated)
    with pytest.raises(ConfigError, match="no kind 'sum': choose from add, mul"):
        saq.quantize_model(net, 8, example=x, junctions=("sum",))
    with pytest.raises(ConfigError, match="choose one of them"):
        saq.quantize_model(net, 8, example=x, junctions=("concat", SHARED))


def test_without_junctions_nothing_is_added() -> None:
    net, x = built(gated)
    q = saq.quantize_model(net, 8, calibration=[x])
    assert not any(isinstance(module, RoutedParent | QuantizedJunction) for module in q.modules())
    assert not any(module._forward_pre_hooks for module in q.modules())


# Computed


@pytest.mark.parametrize("way", ADDITIONS)
def test_sums_are_those_of_quantized_operands(way: str) -> None:
    q, x = quantized(ADDITIONS[way])
    a, b = q.junctions["0"].operands
    with torch.no_grad():
        stem = F.relu(q.stem(x))
        expected = on_grid(a, q.a(stem)) + on_grid(b, stem)
        assert torch.allclose(
            q.body(q, stem).double(), q.a(stem).double() + stem.double()
        )  # outside its forward
        assert torch.allclose(q(x).double(), q.head(expected.float().flatten(2).amax(-1)).double(), atol=1e-6)


def test_in_place_results_reach_all_views() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        out = net.a(x)
        alias = out[:, :3]
        out += x
        return torch.cat([alias, out[:, 3:]], 1)

    q, x = quantized(body, junctions=("add",))
    plain, _ = quantized(lambda net, x: net.a(x) + x, junctions=("add",))
    assert torch.equal(q(x), plain(x))


@pytest.mark.parametrize("body", [iadd, lambda net, x: F.silu(net.a(x), inplace=True) * x])
def test_gradients_in_place_are_those_out_of_place(body: Callable[[Any, Tensor], Tensor]) -> None:
    out_of_place = {iadd: ADDITIONS["plus"]}.get(body, lambda net, x: F.silu(net.a(x)) * x)
    gradients = []
    for each in (body, out_of_place):
        q, x = quantized(each, 4)
        q(x).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in q.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        if not name.startswith("b."):  # which does not run
            assert gradient is not None, name
            assert torch.equal(gradient, gradients[1][name]), name


class DropPath(nn.Module):
    """Multiplies and adds in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.ones(len(x), 1, 1, 1) + 0 if self.training else x


def test_operators_of_called_modules_do_not_count() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = conv(6, 6), DropPath()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.conv(x))

    torch.manual_seed(0)
    net, x = (
        nn.Sequential(conv(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        tiny.images(SIZE),
    )
    q = saq.quantize_model(net, 8, calibration=[x], junctions=ALL)
    assert list(quantized_junctions(q)) == ["1.junctions.0", "2.junctions.0"]
    assert torch.equal(q.train()(x), q.eval()(x))


def test_another_operator_than_traced_is_an_error() -> None:
    q, x = quantized(lambda net, x: net.a(x) + x if not net.training else net.a(x) * x)
    with pytest.raises(UnsupportedModel, match="calls mul where it had add in the traced pass"):
        q.train()(x)


# One quantizer for every tensor


def shared(
    body: Callable[[Any, Tensor], Tensor], junctions: tuple[str, ...] = ALL, **options: Any
) -> dict[str, str]:
    return owners(quantized(body, junctions=junctions, **options)[0])


def test_readers_of_a_tensor_share_its_quantizer() -> None:
    assert shared(lambda net, x: net.a(x) + net.b(x) + x) == {"b": "a", "junctions.1.1": "a"}


def test_max_pools_slices_and_reshapes_keep_the_tensor() -> None:
    assert shared(
        lambda net, x: (
            net.a(F.max_pool2d(x, 2)) + F.pad(x.flatten(2).unflatten(2, (8, 8))[..., ::2, ::2], (0, 0))
        )
    ) == {"junctions.0.1": "a"}


def test_norms_relu_and_writes_make_other_tensors() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        y = x + net.b(F.relu(x))
        x = x.clone()
        x.clamp_(0, 1)
        return y + x

    assert shared(body) == {}


def test_a_module_called_on_several_tensors_has_its_own() -> None:
    assert shared(lambda net, x: net.a(net.a(x)) + x) == {}


def test_concatenations_share_one_step_where_asked() -> None:
    body = lambda net, x: net.b(torch.cat([net.a(x)[:, :3], x[:, :3]], 1))  # noqa: E731
    assert shared(body, ("concat",)) == {"junctions.0.1": "a"}
    assert shared(body, (SHARED,)) == {"b": "a", "junctions.0.0": "a", "junctions.0.1": "a"}


def test_signs_are_those_of_the_tensor() -> None:
    """One operand of the concatenation is never negative, the other is."""
    q, _ = quantized(lambda net, x: net.b(torch.cat([net.a(x)[:, :3], x[:, :3]], 1)), junctions=(SHARED,))
    assert q.a.input_quantizer.grid().lowest == -128
    assert q.b.input_quantizer is q.a.input_quantizer


def test_shared_levels_fit_all_readers() -> None:
    q, x = quantized(lambda net, x: torch.cat([net.a(x), 100 * x], 1)[:, 3:9], junctions=(SHARED,))
    with torch.no_grad():
        largest = float((100 * F.relu(q.stem(x))).max())
    assert q.junctions["1"].operands[0].level() > 0.5 * largest


def test_fewer_bits_act_on_the_shared_grid() -> None:
    q, x = quantized(lambda net, x: net.a(x) + x, "w8a4", ("add",))
    second = q.junctions["0"].operands[1]
    assert (q.a.input_quantizer.bits, second.bits) == (4, 8)
    assert [place.quantizer for place in q.a.requantizes] == [second]
    stem = F.relu(q.stem(x))
    assert torch.equal(q.a.quantized_input(stem), q.a.input_quantizer(second(stem)))
    assert owners(q) == {}


def test_layers_whose_bits_may_change_keep_their_own() -> None:
    net, x = built(lambda net, x: net.a(x) + net.b(x) + x)
    network = traced(net, x, ("add",))
    from saqcli.quant import calibration
    from saqcli.quant.bits import LayerBits

    statistics = calibration.observe(net, [x])
    config = network.costs.uniform("tiny", LayerBits(weight=8, activation=8))
    signed = {name: each.signed for name, each in statistics.items()}
    options = {"a": [LayerBits(weight=4, activation=4)]}
    convert.install(net, convert.Scheme(), config, signed, options)
    a, b, second = net.a.input_quantizer, net.b.input_quantizer, net.junctions["1"].operands[1]
    assert b is second
    assert a is not b
    assert [place.quantizer for place in net.a.requantizes] == [b]


# Networks

NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int], int]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), {"add": 8, "pool": 1}, 30),
    "mobilenetv2": (
        lambda: timm.create_model("mobilenetv2_050", num_classes=5),
        {"add": 10, "pool": 1},
        64,
    ),
    "squeezenet": (
        lambda: torchvision.models.squeezenet1_1(num_classes=5),
        {"concat": 8, "pool": 1},
        19,
    ),
    "efficientnet": (
        lambda: timm.create_model("test_efficientnet", num_classes=5),
        {"silu": 11, "pool": 3, "sigmoid": 2, "mul": 2},
        36,
    ),
    "regnet": (
        lambda: timm.create_model("regnety_002", num_classes=5),
        {"pool": 14, "sigmoid": 13, "mul": 13, "add": 13},
        124,
    ),
}


SOME = [
    pytest.param(name, marks=[pytest.mark.slow] if name in ("mobilenetv2", "regnet") else [])
    for name in NETWORKS
]


@pytest.mark.parametrize("name", SOME)
def test_networks_of_the_libraries(name: str, tmp_path: Path) -> None:
    make, kinds, count = NETWORKS[name]
    torch.manual_seed(0)
    net, x = make().eval(), torch.rand(2, 3, 64, 64)
    wanted = (SHARED, *(kind for kind in ALL if kind != "concat"))
    q = saq.quantize_model(net, 8, calibration=[x], junctions=wanted)
    assert Counter(junction.kind for junction in quantized_junctions(q).values()) == kinds
    places = activation_places(q)
    assert len({id(place.quantizer) for place in places.values()}) == count

    saq.save(q, tmp_path / "q.safetensors")
    loaded = saq.load(tmp_path / "q.safetensors", model=net)
    again = pickle.loads(pickle.dumps(copy.deepcopy(q)))
    with torch.no_grad():
        assert torch.equal(loaded(x), q(x))
        assert torch.equal(again(x), q(x))
    assert owners(loaded) == owners(again) == owners(q)

    again.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in again.parameters())
    # norms that start at zero stop most of them in some networks
    assert any(p.grad.any() for j in quantized_junctions(again).values() for p in j.parameters())

    convert.unwrap(q)
    assert [type(module) for module in q.modules()] == [type(module) for module in net.modules()]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in q.modules())
    assert q.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("name", SOME)
def test_readers_of_one_tensor_have_one_quantizer(name: str) -> None:
    """By the operators themselves: no tensor is quantized by two quantizers in a pass."""
    make, _, _ = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64)
    q = saq.quantize_model(make().eval(), 8, calibration=[x], junctions=tuple(k for k in ALL))
    seen: dict[tuple[int, int], Quantizer] = {}  # by tensor and the number of writes to it
    alive: list[Tensor] = []

    def note(quantizer: Quantizer, given: tuple[Tensor, ...], _: Any) -> None:
        alive.append(given[0])
        assert seen.setdefault((id(given[0]), given[0]._version), quantizer) is quantizer

    for place in activation_places(q).values():
        place.quantizer.register_forward_hook(note)
    with torch.no_grad():
        q(x)
    assert seen


# What is done with quantizers


def test_calibrating_again_changes_nothing() -> None:
    q, x = quantized(ADDITIONS["plus"], "w4a4")
    before = {name: value.clone() for name, value in q.state_dict().items()}
    parameters = [id(parameter) for parameter in q.parameters()]
    saq.calibrate(q, [x])
    assert [id(parameter) for parameter in q.parameters()] == parameters
    assert all(torch.equal(value, before[name]) for name, value in q.state_dict().items())


def test_means_are_corrected_within_owners() -> None:
    """The hooks and routes of junctions must not hide layers from the correction."""
    biases = []
    for junctions in ((), ("add",)):
        net, x = built(ADDITIONS["plus"])
        q = saq.quantize_model(net, "w2a2", calibration=[x], junctions=junctions, correct_bias=True)
        biases.append((q.a.bias - net.a.bias).abs().max().item())
    assert min(biases) > 1e-3
    assert biases[1] == pytest.approx(biases[0], rel=0.5)


def test_the_perturbed_set_holds_their_levels() -> None:
    from saqcli.training.perturbation import PerturbedSet

    q, _ = quantized(ADDITIONS["plus"])
    levels = {id(p) for junction in quantized_junctions(q).values() for p in junction.parameters()}
    perturbed = PerturbedSet(q, ("activation_clips",))
    assert levels <= {id(member) for member in perturbed.parameters}


def test_files_of_another_network_are_refused(tmp_path: Path) -> None:
    q, _ = quantized(ADDITIONS["plus"])
    saq.save(q, tmp_path / "q.safetensors")
    other, _ = built(ADDITIONS["plus"])
    other.stem = nn.Sequential(other.stem)
    with pytest.raises(CorruptArtifact):
        saq.load(tmp_path / "q.safetensors", model=other)


def test_blocks_hold_every_junction_once_and_reconstruct() -> None:
    torch.manual_seed(0)
    net, shape = tiny.residual()
    x = tiny.images(shape, 16)
    q = saq.quantize_model(net.eval(), "w3a4", calibration=[x], junctions=("add", "pool"))
    placed = [name for block in find_blocks(q, x) for name in block.layers]
    assert sorted(placed) == sorted({*quantized_layers(q), *quantized_junctions(q)})
    junction = q.get_submodule("4.junctions.0")
    before = [quantizer.level().item() for quantizer in junction.operands]
    saq.reconstruct(q, [x], iterations=20)
    assert [quantizer.level().item() for quantizer in junction.operands] != before


@pytest.mark.parametrize("style", ["qdq", "exact"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_exports_are_proved(style: str, bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, shape = tiny.residual()
    x = tiny.images(shape, 16)
    q = saq.quantize_model(net.eval(), bits, calibration=[x], junctions=("add", "pool"))
    saq.export_onnx(q, tmp_path / "q.onnx", style, verify=[x])
