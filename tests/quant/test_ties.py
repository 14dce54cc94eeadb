"""Layers that share a weight: one quantizer, one perturbation, counted at every use."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import PolicyMismatch
from saqcli.export import ModelMetadata
from saqcli.export.safetensors import SafetensorsExporter, read_content, rebuild
from saqcli.quant import calibration, convert
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.quant.quantizers import Quantizer
from saqcli.training.perturbation import PerturbedSet
from tests.support import tiny


class Tied(nn.Module):
    """Two linear layers with a shared weight and separate biases."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, tiny.CLASSES)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(F.relu(self.one(x.flatten(1)))))


def tied() -> tuple[Tied, Tensor]:
    torch.manual_seed(0)
    return Tied().eval(), tiny.images((3, 2, 2), 8)


def test_tied_layers_share_one_quantizer() -> None:
    net, x = tied()
    layers = tiny.quantized(net, x, 3)
    assert isinstance(layers["one"].weight_quantizer, Quantizer)
    assert not isinstance(layers["two"].weight_quantizer, Quantizer)
    assert torch.equal(layers["one"].quantized_weight(), layers["two"].quantized_weight())
    assert layers["two"].bits == LayerBits(weight=3, activation=3)
    assert net.one._parameters["weight"] is net.two._parameters["weight"]
    weight = layers["one"].quantized_weight()
    with torch.no_grad():
        hidden = F.relu(F.linear(layers["one"].input_quantizer(x.flatten(1)), weight, net.one.bias))
        expected = F.linear(layers["two"].input_quantizer(hidden), weight, net.two.bias)
        assert torch.equal(net(x), net.head(expected))


def test_perturbation_reaches_every_use_once() -> None:
    net, x = tied()
    tiny.quantized(net, x, 3)
    subject = PerturbedSet(net, ["weights"])
    loss = lambda: net(x).square().sum()  # noqa: E731
    _, gradients = subject.gradients(loss)
    by_layer = dict(zip(quantized_layers(net), gradients, strict=True))
    assert by_layer["two"] is None  # its weight is the first one's
    weight = net.one.quantized_weight().detach().clone().requires_grad_()
    inputs = {name: layer.input_quantizer for name, layer in quantized_layers(net).items()}
    hidden = F.relu(F.linear(inputs["one"](x.flatten(1)), weight, net.one.bias))
    output = net.head(F.linear(inputs["two"](hidden), weight, net.two.bias))
    (expected,) = torch.autograd.grad(output.square().sum(), weight)
    torch.testing.assert_close(by_layer["one"], expected)
    ascent = subject.ascent(gradients, 0.1, "absolute")
    with subject.applied(ascent):
        assert torch.equal(net.two.quantized_weight(), net.one.quantized_weight())
        assert not torch.equal(net.two.quantized_weight(), weight)


def test_copies_stay_tied() -> None:
    import copy

    net, x = tied()
    tiny.quantized(net, x, 3)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.one._parameters["weight"].mul_(2)
        assert torch.equal(twin.two.quantized_weight(), twin.one.quantized_weight())
        assert not torch.equal(twin.one.quantized_weight(), net.one.quantized_weight())


def test_tied_weights_need_equal_bits() -> None:
    net, x = tied()
    convert.wrap(net)
    statistics = calibration.observe(net, [x])
    bits = {"one": 3, "two": 4, "head": 8}
    config = BitConfig(model="tiny", layers={n: LayerBits(weight=b, activation=8) for n, b in bits.items()})
    with pytest.raises(PolicyMismatch, match="two shares its weight"):
        convert.install(net, Scheme(), config, {name: s.signed for name, s in statistics.items()})


def test_second_layer_quantizes_if_first_is_unused() -> None:
    net, _ = tied()
    convert.wrap(net)
    convert.leave_float(net, ["one"])
    assert net.two.tied_to == ()


def test_remaining_tied_layers_share() -> None:
    net, _ = tied()
    net.three = nn.Linear(12, 12)
    net.three.weight = net.one.weight
    convert.wrap(net)
    convert.leave_float(net, ["one"])
    assert net.two.tied_to == ()
    assert net.three.tied_to == (net.two,)


def test_shared_weight_gradient_counts_once() -> None:
    net, x = tied()
    tiny.quantized(net, x, 3)
    _, gradients = PerturbedSet(net, ["weights"]).gradients(
        lambda: net(x).square().sum(), through_rounding=True
    )
    by_layer = dict(zip(quantized_layers(net), gradients, strict=True))
    assert by_layer["one"] is not None
    assert by_layer["two"] is None


@pytest.mark.parametrize("quantizer", ["clip", "dorefa"])
def test_shared_weight_is_stored_once(quantizer: str, tmp_path: Path) -> None:
    net, x = tied()
    scheme = Scheme(quantizer=quantizer)
    layers = tiny.quantized(net, x, 3, scheme)
    facts = ModelMetadata(
        saq_version="0",
        build={},
        preprocessing={},
        policy=BitConfig(model="tiny", layers={name: layer.bits for name, layer in layers.items()}),
        scheme=scheme,
        signed=tiny_signs(layers),
        routed={},
    )
    SafetensorsExporter().export(net, x, tmp_path / "model.safetensors", facts)
    content = read_content(tmp_path / "model.safetensors")
    assert {name for name in content.tensors if "weight" in name and "two" in name} == set()
    loaded = rebuild(Tied(), content.metadata, content.tensors, "model")
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))


def tiny_signs(layers: dict[str, QuantizedLayer]) -> dict[str, bool]:
    return {name: layer.input_quantizer.grid().lowest < 0 for name, layer in layers.items()}
