"""The traced graph: images to logits in plain ONNX, without the exporter's additions."""

from itertools import product
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.export import onnx_helpers, tracing
from tests.support.networks import CHANNELS, images
from tests.support.sweeps import sweep

# One layer each, and whether its bias needs a node.
BIASED = {
    "conv": (lambda: nn.Conv2d(CHANNELS, 4, 3), True),
    "conv_without": (lambda: nn.Conv2d(CHANNELS, 4, 3, bias=False), False),
    "transposed": (lambda: nn.ConvTranspose2d(CHANNELS, 4, 3), True),
    "transposed_without": (lambda: nn.ConvTranspose2d(CHANNELS, 4, 3, bias=False), False),
    "line_without": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(CHANNELS, 4, 3, bias=False)), False),
}


@pytest.mark.parametrize("kind", BIASED)
def test_convolution_bias_only_if_layer_has_one(kind: str) -> None:
    make, biased = BIASED[kind]
    graph = tracing.onnx_graph(make(), images(2)).graph
    (multiplied,) = [node for node in graph if node.op_type in ("Conv", "ConvTranspose")]

    assert len([given for given in multiplied.inputs if given is not None]) == 2 + biased
    if biased:
        assert onnx_helpers.array_of(multiplied.inputs[2]).any()


def test_only_exactly_zero_bias_is_dropped() -> None:
    net = nn.Sequential(nn.Conv2d(CHANNELS, 4, 3), nn.Conv2d(4, 2, 3), nn.Flatten())
    with torch.no_grad():
        for layer in (net[0], net[1]):
            layer.bias.zero_()
        net[1].bias[1] = 1e-30
    graph = tracing.onnx_graph(net, images(2)).graph
    products = [node for node in graph if node.op_type == "Conv"]

    assert [len(node.inputs) for node in products] == [2, 3]


class Windows(nn.Module):
    """Attention in windows: (N, heads, windows, L, E), or fewer dimensions."""

    def __init__(self, dims: int, *, masked: bool) -> None:
        super().__init__()
        self.dims, self.qkv = dims, nn.Linear(CHANNELS, 12)
        self.register_buffer("mask", torch.randn(4, 4) if masked else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.qkv(x[:, :, :4, :4].permute(0, 2, 3, 1))  # (N, 4, 4, 12)
        shape = {3: (x.shape[0] * 4, 4, 12), 4: (-1, 4, 4, 12), 5: (-1, 2, 2, 4, 12)}[self.dims]
        q, k, v = x.reshape(shape).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, self.mask).reshape(x.shape[0], -1)


@pytest.mark.parametrize(
    ("dims", "masked"),
    sweep(product((3, 4, 5), (False, True)), lambda dims, masked: masked or dims == 5),
)
def test_attention_of_any_rank_is_exported(dims: int, masked: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Windows(dims, masked=masked).eval(), images(3)
    tracing.save(tracing.onnx_graph(net, images(2)), tmp_path / "model.onnx", {}, "0")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {tracing.INPUT: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), net(x).detach(), rtol=1e-4, atol=1e-5)
