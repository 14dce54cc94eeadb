"""Asymmetric weights in every style: proved, in 4-bit containers with zero points, and exact where that is promised."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from saqcli.export import STYLES
from saqcli.export.safetensors import SafetensorsExporter, read_content, rebuild
from saqcli.progress import SILENT
from saqcli.quant.convert import Scheme
from saqcli.verify.proof import prove_graph
from tests.support.networks import NETWORKS, Quantized, images, quantize, same_bits
from tests.support.onnx_files import constants, export, graph_of, told
from tests.support.sweeps import sweep

SCHEME = Scheme(quantizer="asymmetric", error_power=2.4)


def lopsided(name: str) -> nn.Module:
    """A network of ``NETWORKS`` whose weights reach further to one side, another one in every channel."""
    net = NETWORKS[name]()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
                weight = module.weight
                weight.copy_(weight.abs() * torch.where(torch.rand_like(weight) < 0.8, 1, -0.4))
                weight[::2] *= -1
    return net


def quantized(name: str, bits: int) -> Quantized:
    return quantize(lambda: lopsided(name), same_bits(bits), SCHEME)


ALWAYS = [(style, "conv_bn", 4) for style in ("exact", "qonnx", "trt")]  # qdq is in test_every_quantizer
RUNS = [
    *ALWAYS,
    ("qdq", "conv_bn", 4),
    ("qdq-vnni", "conv_bn", 4),
    ("qdq", "token_mlp", 4),
    ("exact", "token_mlp", 6),
    ("qonnx", "transposed", 3),
    ("qdq", "transposed", 4),
    ("qdq", "depthwise", 7),
    ("qdq", "conv_bn", 8),
]


@pytest.mark.parametrize(
    ("style", "name", "bits"),
    sweep(RUNS, lambda *case: case in ALWAYS),
    ids=["-".join(map(str, run)) for run in RUNS],
)
def test_file_is_proved(style: str, name: str, bits: int, tmp_path: Path) -> None:
    model = quantized(name, bits)
    path = export(model, style, tmp_path / "model.onnx")
    batches = [(images(8, seed=5), torch.zeros(8, dtype=torch.long))]
    verdict = prove_graph(path, model.model, style, batches, 1, SILENT)
    assert verdict.verified, verdict
    if STYLES.find(style).bit_equal:
        assert verdict.max_abs_diff == 0.0


@pytest.mark.parametrize("name", sweep(["conv_bn", "token_mlp"], lambda name: name == "conv_bn"))
def test_4_bit_weights_have_zero_points(name: str, tmp_path: Path) -> None:
    model = quantized(name, 4)
    graph = graph_of(export(model, "qdq", tmp_path / "model.onnx"))
    known = constants(graph)
    found = 0
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or told(node).get("saq.operand") != "weight":
            continue
        codes, zero = known[node.input[0]], known[node.input[2]]
        assert codes.data_type == zero.data_type == onnx.TensorProto.UINT4
        assert len(numpy_helper.to_array(zero)) > 1
        assert len(set(numpy_helper.to_array(zero).tolist())) > 1
        found += 1
    assert found == len(model.layers)


def test_file_of_tensors_has_exact_bits(tmp_path: Path) -> None:
    model = quantized("conv_bn", 3)
    path = tmp_path / "model.safetensors"
    SafetensorsExporter().export(model.model, images(2), path, model.facts)
    facts, tensors = read_content(path)
    for name, layer in model.layers.items():
        assert tensors[f"{name}.codes"].numel() == -(-layer.latent_weight().numel() * 3 // 8)
    again = rebuild(lopsided("conv_bn"), facts, tensors, str(path))
    assert torch.equal(again(images(8)), model.model(images(8)))
