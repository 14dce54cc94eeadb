"""From settings to optimizer and minimizer."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from saqcli.config import TrainingSection, resolve
from saqcli.errors import ConfigError
from saqcli.quant.convert import wrap
from saqcli.training.minimizers import MINIMIZERS, MSAM, Minimizer
from saqcli.training.minimizers.sharpness_aware import SharpnessAware
from saqcli.training.optimizer import check_training, chosen_radius, make_minimizer, make_optimizer
from saqcli.training.trainer import Trainer
from tests.support.networks import NETWORKS, images, quantize


class Plain(Minimizer):
    """Takes no settings."""

    description = "plain"


def minimizer_of(model: nn.Module, training: TrainingSection) -> Minimizer:
    optimizer = make_optimizer(model, TrainingSection())
    return make_minimizer(model, optimizer, training, chosen_radius(model, training, side=32))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lion", "lookahead_sgd", "lookahead_adamw"])
def test_gradients_are_clipped(optimizer: str) -> None:
    model = nn.Linear(4, 3)
    found = make_optimizer(model, TrainingSection(optimizer=optimizer, clip_grad=1e-3))
    (100 * model(torch.randn(8, 4))).square().sum().backward()
    found.step()

    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("options", [{"rho": 0.6}, {"minimizer": {"rho": 0.6}}])
def test_radius_is_the_configured_one(options: dict[str, float]) -> None:
    training = TrainingSection(ascent_fraction=0.25, **options)  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(1, 1))
    wrap(model)
    minimizer = minimizer_of(model, training)

    assert isinstance(minimizer, SharpnessAware)
    assert minimizer.rho == 0.6


@pytest.mark.parametrize(
    ("method", "perturb", "moved"),
    [
        ("saq", "all", {"weight", "bias", "norm", "level"}),
        ("saq", "weights", {"weight"}),
        ("saq", "norms", {"norm"}),
        ("saq", "layers", {"weight", "bias"}),
        ("sam", "weights", {"latent"}),
        ("msam", "norms", {"norm"}),
    ],
)
def test_perturbed_set_is_the_configured_one(method: str, perturb: str, moved: set[str]) -> None:
    training = TrainingSection(method=method, perturb=perturb)  # type: ignore[arg-type]
    model = quantize(NETWORKS["conv_bn"]).model
    found = minimizer_of(model, training)

    assert isinstance(found, SharpnessAware)
    names = {id(p): name for name, p in model.named_parameters()}
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    kinds = {"weight"} if found.set.layers else set()
    for p in found.set.parameters:
        last = names[id(p)].rpartition(".")[2]
        kinds.add(
            "norm" if id(p) in norms else {"bias": "bias", "clipping_level": "level"}.get(last, "latent")
        )
    assert kinds == moved


def test_sharpness_starts_at_its_share_of_the_steps() -> None:
    training = TrainingSection(epochs=5, sharpness_from=0.8)
    model = nn.Sequential(nn.Linear(1, 1))
    wrap(model)
    trainer = Trainer(
        model, [(torch.randn(2, 1), torch.zeros(2).long())] * 4, training, num_classes=1, image_size=2
    )

    assert isinstance(trainer.minimizer, SharpnessAware)
    assert trainer.minimizer.start == 16


def test_last_step_ascends_in_any_case() -> None:
    training = TrainingSection(epochs=2, sharpness_from=0.999)
    model = nn.Sequential(nn.Linear(1, 1))
    wrap(model)
    batches = [(torch.randn(2, 1), torch.zeros(2).long())] * 4
    trainer = Trainer(model, batches, training, num_classes=1, image_size=2)

    assert isinstance(trainer.minimizer, SharpnessAware)
    assert trainer.minimizer.start == 7


@pytest.mark.parametrize(
    ("settings", "name", "other", "same"),
    [
        ({"perturb": "norms"}, "perturb", ["weights"], ["norms"]),
        ({"rho": 0.2}, "rho", 0.3, 0.2),
        ({"sam_interval": 3}, "interval", 2, 3),
    ],
)
def test_contradicting_options_are_refused(settings: Any, name: str, other: Any, same: Any) -> None:
    model = quantize(NETWORKS["conv_bn"]).model
    with pytest.raises(ConfigError, match=rf"`training\.\w+` and `training\.minimizer\.{name}=.*differ"):
        minimizer_of(model, TrainingSection(**settings, minimizer={name: other}))
    minimizer_of(model, TrainingSection(**settings, minimizer={name: same}))


@pytest.mark.parametrize("settings", [{"perturb": "norms"}, {"sharpness_from": 0.5}])
def test_settings_of_ascents_are_not_ignored(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    """QAT takes them without effect, as the baseline; a method that does not know them refuses."""
    model = nn.Linear(1, 1)
    minimizer_of(model, TrainingSection(method="qat", **settings))  # type: ignore[arg-type]

    monkeypatch.setattr(MINIMIZERS, "find", lambda name: Plain)
    training = TrainingSection(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=next(iter(settings))):
        minimizer_of(model, training)


@pytest.mark.parametrize("method", ["saq", "msam"])
def test_kinds_that_the_network_lacks_are_refused(method: str) -> None:
    training = TrainingSection(method=method, perturb="norms", sharpness_from=0.5)
    model = nn.Sequential(nn.Linear(1, 1))
    wrap(model)
    with pytest.raises(ConfigError, match=r"`training.perturb=norms` was asked for and the network has no"):
        Trainer(model, [(torch.randn(2, 1), torch.zeros(2).long())], training, num_classes=1, image_size=2)


@pytest.mark.parametrize("setting", [{"ascent_fraction": 0.5}, {"ascent_precision": "bfloat16"}])
def test_one_pass_has_no_cheaper_ascent(setting: dict[str, object]) -> None:
    options = {"model.name": "saq/resnet20", "training.method": "msam"}
    options |= {f"training.{name}": value for name, value in setting.items()}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=next(iter(setting))):
        check_training(resolve(options=options))


def test_momentum_outside_the_optimizer_perturbs_nothing() -> None:
    model = quantize(NETWORKS["conv_bn"]).model.train()
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    base = torch.optim.SGD([p for p in model.parameters() if id(p) not in norms], lr=0.1)
    minimizer = MSAM(model, base, rho=0.3, perturb=["norms"])
    for seed in range(3):
        minimizer.step(lambda seed=seed: model(images(4, seed)).square().mean())  # type: ignore[misc]
