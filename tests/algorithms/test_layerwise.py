"""The proof by parts finds one wrong layer, and passes a correct graph."""

from pathlib import Path

import pytest
import torch
from torch import nn

from saqcli.algorithms.exporters.facts import ModelFacts
from saqcli.algorithms.exporters.qdq import QdqExporter
from saqcli.algorithms.graphs.layerwise import LARGEST_ERROR, check_layers
from saqcli.algorithms.graphs.operators import frozen_copy
from saqcli.quant.convert import Scheme, active_bits
from saqcli.quant.layers import quantized_layers
from tests import tiny


def exported(name: str, bits: int, path: Path) -> tuple[nn.Module, torch.Tensor]:
    net, x = tiny.build(name)
    tiny.quantized(net, x, bits)
    net.eval()
    layers = list(quantized_layers(net))
    facts = ModelFacts(
        saq_version="0",
        build={},
        preprocessing={},
        policy=active_bits(net, name, layers),
        scheme=Scheme(),
        signed=dict.fromkeys(layers, True),
        routed={},
    )
    QdqExporter().export(net, x[:2], path, facts)
    return net, x


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["conv_bn", "residual", "depthwise", "tokens"])
def test_a_correct_graph_agrees_in_every_part(name: str, bits: int, tmp_path: Path) -> None:
    net, x = exported(name, bits, tmp_path / "model.onnx")

    check = check_layers(tmp_path / "model.onnx", frozen_copy(net), x)

    assert check.passed
    assert check.largest_error < LARGEST_ERROR / 5
    assert len(check.layers) >= 2


def test_a_single_wrong_layer_is_found_wherever_it_is(tmp_path: Path) -> None:
    net, x = exported("residual", 4, tmp_path / "model.onnx")

    for layer in quantized_layers(net).values():
        layer.latent_weight().data.mul_(-1)
        check = check_layers(tmp_path / "model.onnx", frozen_copy(net), x)
        layer.latent_weight().data.mul_(-1)

        assert not check.passed


def test_a_missing_quantizer_is_found(tmp_path: Path) -> None:
    net, x = exported("conv_bn", 4, tmp_path / "model.onnx")
    frozen = frozen_copy(net)
    next(iter(quantized_layers(frozen).values())).input_quantizer = nn.Identity()

    check = check_layers(tmp_path / "model.onnx", frozen, x)

    assert check.problem is not None
    assert not check.passed
