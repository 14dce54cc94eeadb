"""Every quantizer from float network to files: wrapped, calibrated, trained by SAQ, saved, loaded, exported."""

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import UnsupportedModel
from saqcli.export.operators import frozen_copy
from saqcli.export.qdq import QdqExporter
from saqcli.export.safetensors import SafetensorsExporter, read_content, rebuild
from saqcli.quant.convert import Scheme
from saqcli.quant.grid import LevelTable
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.quant.quantizers import QUANTIZERS, Quantizer, quantizers_of
from saqcli.training.minimizers import MINIMIZERS, MicroBatch
from saqcli.training.perturbation import PerturbedSet
from saqcli.verify.layerwise import LARGEST_ERROR, check_layers
from saqcli.verify.runtime import onnx_session
from saqcli.verify.verdict import judge
from tests.support.cases import scheme_with
from tests.support.networks import NETWORKS, Quantized, images, quantize, same_bits
from tests.support.sweeps import sweep

STEPS = 3
SCHEMES = {name: scheme_with(name) for name in QUANTIZERS} | {
    "published": Scheme(
        weight_grid="paper", granularity="tensor", weight_normalization=True, clip_init="paper"
    ),
    "normalized": Scheme(weight_normalization=True),
    "deviation_dropped": Scheme(weight_normalization=True, restore_deviation=False),
}
RUNS = [
    *((scheme, name) for scheme in SCHEMES for name in ("conv_bn", "token_mlp")),
    *((scheme, "standardized") for scheme in ("lsq_plus", "dorefa", "normalized", "deviation_dropped")),
]
# An export takes seconds: every quantizer once, more where operators differ. ``clip`` is in test_exporters, tables
# are in test_levels.
GRAPHS = [
    ("lsq", "conv_bn"),
    ("lsq_plus", "conv_bn"),
    ("lsq_plus", "token_mlp"),
    ("lsq_plus", "standardized"),
    ("asymmetric", "conv_bn"),
    ("pact", "token_mlp"),
    ("dorefa", "conv_bn"),
    ("published", "conv_bn"),
    ("normalized", "standardized"),
    ("deviation_dropped", "conv_bn"),
    ("deviation_dropped", "standardized"),
]
SLOW_GRAPHS = [("lsq_plus", "token_mlp"), ("lsq_plus", "standardized"), ("published", "conv_bn")]


@torch.no_grad()
def answer(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits


@cache
def trained(scheme: str, name: str) -> Quantized:
    """A network of ``NETWORKS`` after a few steps, in eval mode."""
    quantized = quantize(NETWORKS[name], scheme=SCHEMES[scheme])
    model = quantized.model.train()
    base = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    minimizer = MINIMIZERS["saq"](model, base, rho=0.3)
    for step in range(STEPS):
        x = images(16, seed=step)
        labels = torch.arange(16) % 5
        minimizer.step(
            [[MicroBatch(lambda *, ascent=False, x=x, y=labels: F.cross_entropy(model(x), y), 1.0)]]
        )  # type: ignore[misc]
    model.eval()
    return quantized


# Every scheme on one network: that with signed inputs where the grid of inputs is its own.
ALWAYS = {
    *((scheme, "token_mlp" if scheme in ("log2", "adaptive", "pact") else "conv_bn") for scheme in SCHEMES),
    ("normalized", "standardized"),
}
each_run = pytest.mark.parametrize(
    ("scheme", "name"),
    sweep(RUNS, lambda *case: case in ALWAYS),
    ids=["-".join(run) for run in RUNS],
)


@each_run
def test_training_moves_all_parameters(scheme: str, name: str) -> None:
    before = dict(quantize(NETWORKS[name], scheme=SCHEMES[scheme]).model.named_parameters())
    after = dict(trained(scheme, name).model.named_parameters())
    still = [key for key in before if torch.equal(before[key], after[key])]
    # A bias before a batch norm has no effect; these get no gradient if nothing is outside the range.
    may = ("bias", "offset", *(("input_quantizer.clipping_level",) if scheme == "pact" else ()))
    assert not [key for key in still if not key.endswith(may)]
    if scheme in ("lsq_plus", "pact"):
        assert [key for key in before if key.endswith(may[1:]) and key not in still]
    assert all(value.isfinite().all() for value in after.values())


@each_run
def test_file_reloads_bit_identically(scheme: str, name: str, tmp_path: Path) -> None:
    quantized = trained(scheme, name)
    path = tmp_path / "model.safetensors"
    state = {key: value.clone() for key, value in quantized.model.state_dict().items()}
    SafetensorsExporter().export(quantized.model, images(2), path, quantized.facts)
    torch.manual_seed(7)
    facts, tensors = read_content(path)
    model = rebuild(NETWORKS[name](), facts, tensors, str(path))
    again = tmp_path / "again.safetensors"
    SafetensorsExporter().export(model, images(2), again, quantized.facts)

    assert torch.equal(answer(model, images(16)), answer(quantized.model, images(16)))
    assert all(torch.equal(value, state[key]) for key, value in quantized.model.state_dict().items())
    assert again.read_bytes() == path.read_bytes()


@each_run
def test_frozen_model_is_identical_or_refused(scheme: str, name: str) -> None:
    quantized = trained(scheme, name)
    weights = [layer.weight_quantizer for layer in quantized.layers.values()]
    if not any(isinstance(each.grid(), LevelTable) for each in weights if isinstance(each, Quantizer)):
        frozen = frozen_copy(quantized.model)
        assert torch.equal(answer(frozen, images(4)), answer(quantized.model, images(4)))
    else:
        with pytest.raises(UnsupportedModel, match=f"quantizer {scheme} has a table of levels"):
            frozen_copy(quantized.model)


@pytest.mark.parametrize(
    ("scheme", "name"),
    sweep(GRAPHS, lambda *case: case not in SLOW_GRAPHS),
    ids=["-".join(run) for run in GRAPHS],
)
def test_onnx_matches_the_model(scheme: str, name: str, tmp_path: Path) -> None:
    quantized = trained(scheme, name)
    path = tmp_path / "model.onnx"
    QdqExporter().export(quantized.model, images(2), path, quantized.facts)
    x = images(16, seed=5)
    frozen = frozen_copy(quantized.model)

    assert torch.equal(answer(frozen, x), answer(quantized.model, x))
    check = check_layers(path, frozen, x)
    assert check.passed
    assert check.largest_error < LARGEST_ERROR / 10
    for optimized in (False, True):
        assert judge(answer(quantized.model, x), onnx_session(path, optimized=optimized)(x)).verified


def set_offset(quantizer: nn.Module, lowest: int) -> None:
    with torch.no_grad():
        quantizer.offset.copy_(quantizer.step() * lowest)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("bits", "lowest", "container", "zero", "clipped"),
    [
        (8, -20, onnx.TensorProto.UINT8, 20, False),
        (8, -255, onnx.TensorProto.UINT8, 255, False),
        (8, -128, onnx.TensorProto.INT8, 0, False),
        (4, -3, onnx.TensorProto.INT8, 0, True),
        (2, 0, onnx.TensorProto.UINT8, 0, True),
    ],
)
def test_offset_becomes_a_zero_point(
    bits: int, lowest: int, container: int, zero: int, clipped: bool, tmp_path: Path
) -> None:
    quantized = quantize(NETWORKS["token_mlp"], same_bits(bits), Scheme(quantizer="lsq_plus"))
    layer = quantized.layers["4"]  # after the GELU
    set_offset(layer.input_quantizer, lowest)
    path = tmp_path / "model.onnx"
    QdqExporter().export(quantized.model, images(2), path, quantized.facts)
    graph = onnx.load(str(path)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    step = float(layer.input_quantizer.step().detach())  # type: ignore[operator]
    (node,) = [
        n for n in graph.node
        if n.op_type == "QuantizeLinear" and float(numpy_helper.to_array(constants[n.input[1]])) == step
    ]  # fmt: skip

    point = constants[node.input[2]]
    assert (point.data_type, int(numpy_helper.to_array(point))) == (container, zero)
    assert (made[node.input[0]].op_type == "Clip") == clipped
    check = check_layers(path, frozen_copy(quantized.model), images(16))
    assert check.passed
    x = images(16, seed=5)
    for optimized in (False, True):
        answered = onnx_session(path, optimized=optimized)(x)
        assert judge(answer(quantized.model, x), answered).verified


def test_lsq_plus_range_fits_gelu_better() -> None:
    """GELU never falls below -0.17: of 16 levels a signed grid wastes half."""
    x = F.gelu(2 * torch.randn(20_000))
    errors = {}
    for name in ("lsq", "lsq_plus"):
        quantizer = (
            quantize(NETWORKS["token_mlp"], same_bits(4), Scheme(quantizer=name)).layers["4"].input_quantizer
        )
        assert isinstance(quantizer, Quantizer)
        quantizer.fit(x)
        with torch.no_grad():
            errors[name] = float((quantizer(x) - x).square().mean())
    assert errors["lsq_plus"] < errors["lsq"] / 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizer_parameters_are_perturbed(scheme: str) -> None:
    model = quantize(NETWORKS["conv_bn"], scheme=SCHEMES[scheme]).model
    layers: list[QuantizedLayer] = list(quantized_layers(model).values())
    for kind, of in (("activation_clips", "input_quantizer"), ("weight_clips", "weight_quantizer")):
        learned = [id(p) for layer in layers for p in getattr(layer, of).parameters()]
        members = PerturbedSet(model, ["weights", kind])  # type: ignore[list-item]
        assert [id(p) for p in members.parameters] == learned
    offsets = {id(q.offset) for q in quantizers_of(model) if hasattr(q, "offset")}
    found = PerturbedSet(model, ["activation_clips"])._members
    assert {id(member.parameter) for member in found if not member.scales} == offsets
