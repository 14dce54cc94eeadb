"""Dampening against its formula in float64, and what it does to weights over a training."""

import math

import pytest
import torch
from torch import nn

from saqcli.config import TrainingSection
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.training.dampening import Dampening
from saqcli.training.trainer import Trainer
from tests.support.networks import NETWORKS, quantize
from tests.support.steps import batch

BATCHES = [batch(8, seed) for seed in range(3)]


def codes_and_distance(layer: QuantizedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Q(w) and w - Q(w) where w is within the grid, else 0; in float64."""
    weight = layer.latent_weight().detach()
    quantized = layer.weight_quantizer(weight).detach().double()
    level = layer.weight_quantizer.level().detach()  # type: ignore[operator]
    inside = weight.abs() <= level
    return quantized, torch.where(inside, weight.double() - quantized, 0.0)


@pytest.mark.parametrize("done", [0.0, 0.25, 1.0])
def test_pull_is_the_gradient_of_its_formula(done: float) -> None:
    model = quantize(NETWORKS["conv_bn"]).model
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Dampening(model, optimizer, 0.3).set(done)
    expected = []
    for layer in quantized_layers(model).values():
        weight = layer.latent_weight()
        weight.grad = torch.ones_like(weight)
        distance = codes_and_distance(layer)[1]
        change = 1 + 2 * 0.3 * (1 - math.cos(math.pi * done)) / 2 * distance
        expected.append(weight.detach().double() - change)

    optimizer.step()

    found = [layer.latent_weight() for layer in quantized_layers(model).values()]
    torch.testing.assert_close([w.double() for w in found], expected, rtol=0, atol=1e-6)


def test_derived_weights_are_pulled_too() -> None:
    model = quantize(NETWORKS["standardized"]).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    Dampening(model, optimizer, 1.0).set(1.0)
    layers = quantized_layers(model).values()

    def distance() -> float:
        return sum(
            float((layer.effective_weight() - layer.quantized_weight()).detach().square().sum())
            for layer in layers
        )

    before = distance()
    for _ in range(20):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert distance() < 0.9 * before


def test_weights_end_nearer_to_their_levels() -> None:
    def train(dampening: float) -> float:
        torch.manual_seed(0)
        model: nn.Module = quantize(NETWORKS["conv_bn"]).model
        training = TrainingSection(method="qat", epochs=20, lr=0.05, dampening=dampening)
        Trainer(model, BATCHES, training, num_classes=5, image_size=8).fit()
        apart = [codes_and_distance(layer)[1].square().mean() for layer in quantized_layers(model).values()]
        return float(torch.stack(apart).mean())

    assert train(2.0) < 0.5 * train(0.0)
