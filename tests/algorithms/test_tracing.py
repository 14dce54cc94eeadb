"""What comes out of tracing: images to logits in plain ONNX, without what the exporter adds of its own."""

import pytest
import torch
from networks import CHANNELS, images
from torch import nn

from saqcli.algorithms.graphs import parts, tracing

# One layer each, and whether it has a bias that is worth a node.
BIASED = {
    "conv": (lambda: nn.Conv2d(CHANNELS, 4, 3), True),
    "conv_without": (lambda: nn.Conv2d(CHANNELS, 4, 3, bias=False), False),
    "transposed": (lambda: nn.ConvTranspose2d(CHANNELS, 4, 3), True),
    "transposed_without": (lambda: nn.ConvTranspose2d(CHANNELS, 4, 3, bias=False), False),
    "line_without": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(CHANNELS, 4, 3, bias=False)), False),
}


@pytest.mark.parametrize("kind", BIASED)
def test_a_convolution_has_a_bias_only_where_the_layer_has_one(kind: str) -> None:
    make, biased = BIASED[kind]
    graph = tracing.onnx_graph(make(), images(2)).graph
    (product,) = [node for node in graph if node.op_type in ("Conv", "ConvTranspose")]

    assert len([given for given in product.inputs if given is not None]) == 2 + biased
    if biased:
        assert parts.array_of(product.inputs[2]).any()


def test_a_bias_that_is_zero_is_dropped_and_one_that_is_nearly_zero_is_not() -> None:
    net = nn.Sequential(nn.Conv2d(CHANNELS, 4, 3), nn.Conv2d(4, 2, 3), nn.Flatten())
    with torch.no_grad():
        for layer in (net[0], net[1]):
            layer.bias.zero_()
        net[1].bias[1] = 1e-30
    graph = tracing.onnx_graph(net, images(2)).graph
    products = [node for node in graph if node.op_type == "Conv"]

    assert [len(node.inputs) for node in products] == [2, 3]
