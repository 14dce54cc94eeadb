"""Networks written as ONNX once per session, and readers of such files."""

import os
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from saqcli.export import EXPORTERS
from saqcli.quant.convert import Scheme
from saqcli.quant.layer import QuantizedLayer
from saqcli.quant.quantizers import Quantizer
from tests.support.networks import NETWORKS, Bank, Quantized, bank_bits, images, quantize

GRIDS = ("auto", "paper", "zero")
# "auto" is the paper's grid or the integer one: single layers see each at all bits, deep networks meet the default.
EXPORTED = [
    ("bank", "paper"),
    ("bank", "zero"),
    *((name, grid) for name in NETWORKS for grid in ("auto", "zero")),
]


def first_of_all(name: str, grid: str) -> bool:
    """The part of ``EXPORTED`` in every test run: layers on the paper's grid, networks on the default."""
    return grid in ("paper", "auto") or name in ("conv_bn", "token_mlp")


EPSILON = 2.0**-24  # relative rounding error of one float32 operation
INT4, INT8, INT16 = onnx.TensorProto.INT4, onnx.TensorProto.INT8, onnx.TensorProto.INT16
UINT8 = onnx.TensorProto.UINT8


@cache
def network(name: str, grid: str = "auto", granularity: str = "channel") -> Quantized:
    """A network of ``NETWORKS`` at mixed bits, or all single layers at all bits."""
    scheme = Scheme(weight_grid=grid, granularity=granularity)  # type: ignore[arg-type]
    return quantize(Bank, bank_bits, scheme) if name == "bank" else quantize(NETWORKS[name], scheme=scheme)


@torch.no_grad()
def set_gains(model: nn.Module) -> None:
    """Give batch norms negative gains and one zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight[::2] *= -1
            module.weight[1] = 0


def export(quantized: Quantized, style: str, path: Path) -> Path:
    EXPORTERS[style]().export(quantized.model, images(2), path, quantized.facts)
    return path


def written(folder: Path, style: str, quantized: Quantized, name: str) -> Path:
    """The file of ``quantized``, written once per test session."""
    path = folder / f"{name}-{style}{EXPORTERS[style]().suffix}"
    if not path.exists():
        export(quantized, style, path.with_name(f"{os.getpid()}-{path.name}")).replace(path)
    return path


@torch.no_grad()
def answer(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits


def weights_of(quantized: Quantized) -> dict[str, QuantizedLayer]:
    return {
        n: layer for n, layer in quantized.layers.items() if isinstance(layer.weight_quantizer, Quantizer)
    }


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norm after each convolution, by the convolution's name."""
    found = {}
    for name, parent in model.named_modules():
        if isinstance(parent, nn.Sequential):
            children = list(parent.named_children())
            for (child, layer), (_, norm) in pairwise(children):
                if isinstance(layer, QuantizedLayer) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    found[f"{name}.{child}" if name else child] = norm
    return found


def gain_of(norm: Any) -> Any:
    """The factor of a batch norm per channel, in float64."""
    return (norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)).detach().numpy()


def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(str(path)).graph


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in graph.node for output in node.output}


def told(node: onnx.NodeProto) -> dict[str, str]:
    """The metadata of a node."""
    return {entry.key: entry.value for entry in node.metadata_props}


def dequantized(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, onnx.TensorProto]]:
    """Every DequantizeLinear of weight codes, excluding int32 biases."""
    known = constants(graph)
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0].endswith(".codes"):
            yield node, known[node.input[0]]


def integers(tensor: onnx.TensorProto) -> Any:
    """Weight codes minus the zero point, which is 128 in UINT8."""
    return numpy_helper.to_array(tensor).astype(np.int32) - (128 if tensor.data_type == UINT8 else 0)
