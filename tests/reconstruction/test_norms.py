"""Balanced norms: the float network stays the same, and quantization errors of the layers behind norms fall."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import saqcli
from saqcli.api.networks import float_network, uniform_policy
from saqcli.quant import convert
from saqcli.quant.bits import LayerBits
from saqcli.quant.calls import Call
from saqcli.quant.convert import Scheme
from saqcli.reconstruction.norms import NORMS, balance_norms, find_norms, fold_ratios

SIDE = 32
SMALL: dict[str, Any] = {"num_classes": 5, "depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": SIDE}


class Padded(nn.Module):
    """A channels-last norm, and a convolution that pads what it normalizes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.head = nn.LayerNorm(3), nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        scores: Tensor = self.head(self.conv(x).relu().mean((2, 3)))
        return scores


class Two(nn.Module):
    """A norm read by two layers without biases, and one that is also added."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(SIDE), nn.LayerNorm(SIDE)
        self.q, self.k, self.v = (nn.Linear(SIDE, SIDE, bias=index == 2) for index in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x.mean(1))
        z = self.two(self.q(y) * self.k(y))
        scores: Tensor = (z + self.v(z)).mean(1)
        return scores


def vit() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(**SMALL, patch_size=8)


def swin() -> nn.Module:
    return timm.models.swin_transformer.SwinTransformer(
        img_size=SIDE,
        patch_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
        num_classes=5,
    )


def convnext() -> nn.Module:
    return timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5)


def vit_of_torchvision() -> nn.Module:
    return torchvision.models.VisionTransformer(SIDE, 8, 2, 2, 32, 64, num_classes=5)


# Network, norms, those that can be balanced, and those of them that take no offset.
CASES: dict[str, tuple[Any, int, int, int]] = {
    "vit": (vit, 5, 5, 0),
    "swin": (swin, 11, 9, 1),
    "convnext": (convnext, 9, 8, 0),
    "torchvision": (vit_of_torchvision, 5, 5, 0),
    "padded": (Padded, 1, 1, 1),
    "two": (Two, 2, 1, 1),
}


def uneven(build: Any) -> nn.Module:
    """A network whose norms have channels of very different ranges, as trained transformers do."""
    torch.manual_seed(0)
    model: nn.Module = build().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORMS):
                module.weight.mul_(torch.exp(torch.randn_like(module.weight)))
                module.bias.add_(torch.randn_like(module.bias))
            if isinstance(module, nn.Linear):  # torchvision's head is zero
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("attention", [False, True])
@torch.no_grad()
def test_folding_keeps_the_float_network(name: str, attention: bool) -> None:
    build, count, foldable, unshifted = CASES[name]
    model, x = uneven(build), torch.randn(2, 3, SIDE, SIDE)
    truth = copy.deepcopy(model).double()(x.double())
    network = float_network(model, Call((x,)), quantize_attention=attention)
    before = (network.model(x) - truth).abs().max()
    found = find_norms(network.model, x[:1])
    able = [each for each in found if not each.reason]

    assert (len(found), len(able)) == (count, foldable)
    assert sum(not each.shifts for each in able) == unshifted
    for each in able:
        channels = network.model.get_submodule(each.norm).weight.numel()  # type: ignore[union-attr, operator]
        offset = torch.randn(channels) if each.shifts else torch.zeros(channels)
        fold_ratios(network.model, each, torch.exp(torch.randn(channels)), offset)
    assert (network.model(x) - truth).abs().max() < 20 * before + 1e-6 * truth.abs().max()


def test_packed_projections_are_one_reader() -> None:
    model = uneven(vit_of_torchvision)
    convert.wrap(model)
    found = find_norms(model, torch.randn(1, 3, SIDE, SIDE))
    assert found[0].layers == ("encoder.layers.encoder_layer_0.self_attention",)


def test_a_post_norm_stays_with_a_reason() -> None:
    model = uneven(Two)
    convert.wrap(model)
    one, two = find_norms(model, torch.randn(1, 3, SIDE, SIDE))
    assert (one.layers, one.reason) == (("q", "k"), "")
    assert two.reason == "add reads its output too"


@pytest.mark.parametrize(
    "scheme", [Scheme(), Scheme(activation_quantizer="lsq_plus")], ids=["clip", "lsq_plus"]
)
def test_errors_of_layers_fall_by_what_is_reported(scheme: Scheme) -> None:
    x = torch.randn(8, 3, SIDE, SIDE)
    network = float_network(uneven(vit), Call((x,)))
    policy = uniform_policy(network, LayerBits(weight=4, activation=4), {})
    first = balance_norms(network.model, [Call((x,))], policy, scheme)
    again = balance_norms(network.model, [Call((x,))], policy, scheme)

    assert all(each.folded and each.after < 0.9 * each.before for each in first)
    assert sum(each.after for each in again) <= sum(each.after for each in first) * 1.05


@torch.no_grad()
def test_error_is_that_of_a_layer_in_float64() -> None:
    x, rows = torch.randn(8, 3, SIDE, SIDE), []
    network = float_network(uneven(vit), Call((x,)))
    layer: Any = network.model.get_submodule("blocks.0.mlp.fc1")
    layer.register_forward_pre_hook(lambda _, given: rows.append(given[0].flatten(0, -2)))
    network.model(x)
    truth = F.linear(rows[0].double(), layer.latent_weight().double(), layer.bias.double())
    variance = (truth - truth.mean(0)).square().sum()
    policy = uniform_policy(network, LayerBits(weight=4, activation=4), {})
    report = {each.norm: each for each in balance_norms(network.model, [Call((x,))] * 8, policy, Scheme())}
    rows.clear()
    network.model(x)
    weights = Scheme().new_weight_quantizer(layer, (4,))
    weights.fit(layer.latent_weight())
    inputs = Scheme().new_input_quantizer(layer, (4,), signed=True)
    inputs.fit(rows[0])
    found = F.linear(inputs(rows[0]).double(), weights(layer.latent_weight()).double(), layer.bias.double())
    error = float((found - truth).square().sum() / variance)
    assert report["blocks.0.norm2"].after == pytest.approx(error, rel=0.2)


def test_quantized_network_is_nearer_to_float() -> None:
    model, x = uneven(vit), torch.randn(16, 3, SIDE, SIDE)
    with torch.no_grad():
        truth, errors = model(x), []
        for balanced in (False, True):
            quantized = saqcli.quantize_model(model, "w8a6", calibration=[x], balance_norms=balanced)
            errors.append(float((quantized(x) - truth).square().mean()))
        assert torch.equal(model(x), truth)  # the float module is not changed
    assert errors[1] < errors[0]
