"""Published radii by network and bit-width."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.config import TrainingSection
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.layer import is_convolution, quantized_layers
from saqcli.training.minimizers import MINIMIZERS
from saqcli.training.optimizer import chosen_radius
from saqcli.training.radii import published_radius
from tests.support.networks import NETWORKS, images, quantize


def quantized(bits: int) -> Any:
    width = LayerBits(weight=bits, activation=bits)
    return quantize(NETWORKS["conv_bn"], lambda names: dict.fromkeys(names, width)).model


@pytest.mark.parametrize(
    ("network", "side", "expected"),
    [
        ("saq/preresnet20", 32, (0.4, 0.7, 0.9)),
        ("saq/mobilenetv2_cifar", 32, (0.5, 0.7, 0.9)),
        ("timm/resnet18.a1_in1k", 224, (0.15, 0.15, 0.3)),
        ("torchvision/mobilenet_v2", 224, (0.15, 0.15, 0.3)),
        ("", 32, (0.4, 0.7, 0.9)),
        ("timm/resnet50", 224, (0.15, 0.15, 0.3)),
    ],
)
def test_radii_are_those_of_the_paper(network: str, side: int, expected: tuple[float, float, float]) -> None:
    found = [published_radius(quantized(bits), side, network) for bits in (2, 3, 4)]
    assert tuple(radius.rho for radius in found) == expected
    for bits, radius in zip((2, 3, 4), found, strict=True):
        assert radius.source.endswith(f"arXiv:2111.12273, section 5, at {bits} bits")


def test_source_says_whose_row_it_is() -> None:
    model = quantized(4)
    assert published_radius(model, 224, "timm/mobilenetv2_100").source.startswith("MobileNetV2,")
    assert published_radius(quantized(2), 224, "timm/mobilenetv2_100").source.startswith("that of ResNet-18")
    assert published_radius(model, 32, "timm/resnet50").source.startswith("that of ResNet-20")


@pytest.mark.parametrize("options", [{"rho": 0.6}, {"minimizer": {"rho": 0.6}}])
def test_given_radius_names_its_setting(options: Any) -> None:
    found = chosen_radius(quantized(4), TrainingSection(**options), 32, "saq/preresnet20")
    assert found.rho == 0.6
    assert found.source == ("training.rho" if "rho" in options else "training.minimizer.rho")


@pytest.mark.parametrize("method", ["saq", "case1", "msam"])
def test_relative_perturbation_is_the_same_without_deviations(method: str) -> None:
    """Behind a batch norm a dropped deviation changes no loss, and the same radius is the same relative change."""
    found = []
    for restored in (True, False):
        scheme = Scheme(granularity="tensor", weight_normalization=True, restore_deviation=restored)
        model = quantize(NETWORKS["conv_bn"], scheme=scheme).model.train()
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        minimizer = MINIMIZERS[method](model, base, rho=0.4)  # type: ignore[call-arg]
        seen: list[list[float]] = []
        for _ in range(2):
            minimizer.step(lambda model=model, seen=seen: _loss(model, seen))
        found.append(seen[-1])
    assert any(found[0])
    assert found[1] == pytest.approx(found[0], rel=0.05)  # norms have an epsilon


def _loss(model: nn.Module, seen: list[list[float]]) -> Tensor:
    """A loss, which notes how far each convolution's weight is from the quantized one, relative to that."""
    row = []
    for layer in quantized_layers(model).values():
        if is_convolution(layer):
            moved, own = layer.quantized_weight(), layer.weight_quantizer(layer.effective_weight())
            row.append(float((moved - own).detach().norm() / own.detach().norm()))
    seen.append(row)
    return F.cross_entropy(model(images(16)), torch.arange(16) % 5)
