"""timm's tiny networks, one for each kind of layer and block, from wrapping to the exported file.

Weights are random. Batch norms are calibrated, and zero-initialized parameters (residual scales, last norms) are
filled: otherwise no signal passes, and a layer missing from a step would go unnoticed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.api.costs import unquantized
from saqcli.config import ModelSection
from saqcli.export import ModelMetadata
from saqcli.pipelines.setup import Network, load_float, wrap_and_trace
from saqcli.progress import SILENT
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.calibration import fit, observe
from saqcli.quant.convert import Scheme
from saqcli.quant.layer import frozen_batch_stats, quantized_layers
from saqcli.training.minimizers import MINIMIZERS, MicroBatch
from saqcli.training.perturbation import PerturbedSet
from saqcli.verify.publish import export_verified
from saqcli.verify.verdict import natural

FAST = {  # found in none of the others
    "test_resnet": "plain convolutions, shared groups",
    "test_efficientnet": "depthwise convolutions, squeeze and excitation, SiLU",
    "test_mambaout": "gated branches of a split",
    "test_vit": "tokens, attention",
}
SLOW = (  # nfnet has standardized convolutions and no norms, convnext linear layers over channels-last
    "test_nfnet test_byobnet test_convnext test_coatnet test_convnext2 test_convnext3 test_efficientnet_evos "
    "test_efficientnet_gn test_efficientnet_ln test_maxvit test_vit2 test_vit3 test_vit4 test_vit_relpos"
).split()
SIDE, CLASSES, IMAGES = 64, 10, 8
NATIVE = {"test_coatnet", "test_maxvit"}  # its windows fit no other size


@dataclass
class Subject:
    """A network in progress: its float outputs, and how it is quantized."""

    network: Network
    images: Tensor
    in_float: Tensor
    wrapped: Tensor
    statistics: Any
    policy: BitConfig

    @property
    def model(self) -> nn.Module:
        return self.network.model

    @property
    def signed(self) -> dict[str, bool]:
        return {name: facts.signed for name, facts in self.statistics.items()}

    def loss(self, *, ascent: bool = False) -> Tensor:
        return F.cross_entropy(self.model(self.images), torch.arange(len(self.images)) % CLASSES)


@torch.no_grad()
def fill_zeros(model: nn.Module, images: Tensor) -> None:
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and parameter.abs().max() <= 1e-3:
            parameter.fill_(0.5)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()(images)
    model.eval()


@pytest.fixture(
    scope="module", params=[*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def subject(request: pytest.FixtureRequest) -> Subject:
    """Wrapped, traced and calibrated at 8 bits."""
    torch.manual_seed(0)
    size = None if request.param in NATIVE else SIDE
    section = ModelSection(
        name=f"timm/{request.param}", pretrained=False, num_classes=CLASSES, input_size=size
    )
    loaded = load_float(section, SILENT)
    images = natural(IMAGES, loaded.preprocessing.input_size, torch.Generator().manual_seed(0))
    fill_zeros(loaded.model, images)
    with torch.inference_mode():
        in_float = loaded.model(images)
    network = wrap_and_trace(loaded)
    with torch.inference_mode():
        wrapped = loaded.model(images)
    policy = network.costs.uniform(loaded.name, LayerBits(weight=8, activation=8))
    found = Subject(network, images, in_float, wrapped, observe(loaded.model, [images]), policy)
    convert.install(loaded.model, Scheme(), policy, found.signed)
    fit(loaded.model, found.statistics)
    return found


def test_wrapping_is_bit_identical(subject: Subject) -> None:
    assert torch.equal(subject.wrapped, subject.in_float)


def test_every_layer_is_traced_and_quantized(subject: Subject) -> None:
    layers = quantized_layers(subject.model)
    kinds = (nn.Conv2d, nn.Linear)
    assert set(layers) == {name for name, m in subject.model.named_modules() if isinstance(m, kinds)}
    assert set(layers) == set(subject.network.traced.layers) == set(subject.policy.layers)
    assert unquantized(subject.network.traced) == []
    assert sum(layer.macs for layer in subject.network.costs.layers) == subject.network.costs.macs


def test_8_bits_are_close_to_float(subject: Subject) -> None:
    with torch.inference_mode():
        quantized = subject.model(subject.images)
    assert not torch.equal(quantized, subject.in_float)
    mean = subject.in_float.mean(0)
    assert F.cosine_similarity(subject.in_float - mean, quantized - mean).mean() > 0.9


def test_saq_step_moves_every_layer(subject: Subject) -> None:
    model, layers = subject.model.train(), quantized_layers(subject.model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        perturbed = PerturbedSet(model)
        with frozen_batch_stats(model):
            _, gradients = perturbed.gradients(subject.loss)
        ascent = perturbed.ascent(gradients, 0.1, "deviation")
        still = [name for name, e in zip(layers, ascent.weights, strict=True) if not e.any()]
        assert still == []

        latent = {name: layer.latent_weight().detach().clone() for name, layer in layers.items()}
        base = torch.optim.SGD([layer.latent_weight() for layer in layers.values()], lr=0.05)
        MINIMIZERS["saq"](model, base, rho=0.1).step([[MicroBatch(subject.loss, 1.0)]])
        moved = [
            name for name, layer in layers.items() if not torch.equal(layer.latent_weight(), latent[name])
        ]
        assert moved == list(layers)
        assert all(layer.perturbation is None for layer in layers.values())
    finally:
        model.load_state_dict(before)
        model.eval()


def test_policy_survives_its_file(subject: Subject) -> None:
    back = BitConfig.model_validate_json(subject.policy.to_json())
    assert back == subject.policy
    assert convert.active_bits(subject.model, back.model, back.layers) == back


@pytest.mark.parametrize(("style", "ending"), [("safetensors", "safetensors"), ("qdq", "onnx")])
def test_export_is_verified(subject: Subject, tmp_path: Path, style: str, ending: str) -> None:
    loaded = subject.network.loaded
    facts = ModelMetadata(
        saq_version="test",
        build=loaded.build,
        preprocessing=loaded.preprocessing.to_dict(),
        policy=subject.policy,
        scheme=Scheme(),
        signed=subject.signed,
        routed=subject.network.traced.routed,
    )
    batches = [(subject.images, torch.zeros(IMAGES, dtype=torch.long))]
    path = tmp_path / f"model.{ending}"

    verdict = export_verified(subject.model, facts, path, style, batches, 1, SILENT)

    assert verdict.figures()["verified"]
    assert path.is_file()
