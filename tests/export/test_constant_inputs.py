"""Layers fed by constants instead of the image, such as relative position tables of attention."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.export import EXPORTERS, STYLES
from saqcli.export.model_metadata import ModelMetadata
from saqcli.export.operators import frozen_copy
from saqcli.quant.convert import Scheme, active_bits
from saqcli.quant.layer import quantized_layers
from saqcli.verify.layerwise import check_layers
from tests.support import tiny
from tests.support.sweeps import sweep


class Positions(nn.Module):
    """Attention scores shifted by a small network over patch distances, as in Swin V2."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.first, self.second = nn.Linear(2, 6), nn.Linear(6, 1, bias=False)
        self.head = nn.Linear(8, tiny.CLASSES)
        places = torch.stack(torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij")).flatten(1)
        self.register_buffer("table", (places[:, :, None] - places[:, None, :]).permute(1, 2, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        moved = self.second(F.relu(self.first(self.table))).squeeze(-1)
        shares = (x @ x.transpose(1, 2) + moved).softmax(-1)
        return self.head((shares @ x).mean(1))


@pytest.mark.parametrize("style", sweep(["qdq", "trt", "qonnx"], lambda style: style == "qdq"))
def test_constant_input_layers_are_exported(style: str, tmp_path: Path) -> None:
    net, x = Positions().eval(), tiny.images((3, 8, 8))
    layers = list(tiny.quantized(net, x, 8))
    facts = ModelMetadata(
        saq_version="0",
        build={},
        preprocessing={},
        policy=active_bits(net, "positions", layers),
        scheme=Scheme(),
        signed=dict.fromkeys(layers, True),
        routed={},
    )
    path = tmp_path / "model.onnx"
    EXPORTERS[style]().export(net, x[:2], path, facts)

    check = check_layers(path, frozen_copy(net), x, STYLES[style].quantizers)

    assert check.passed, (check.problem, check.wrong)
    assert {layer.layer for layer in check.layers} == set(quantized_layers(net))
