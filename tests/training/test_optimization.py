"""From settings to optimizer and minimizer."""

import math

import pytest
import torch
from torch import nn

from saqcli.config import TrainingSection
from saqcli.quant.convert import wrap
from saqcli.training.minimizers.sharpness_aware import SharpnessAware
from saqcli.training.optimizer import make_minimizer, make_optimizer


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
    minimizer = make_minimizer(model, make_optimizer(model, training), training, side=32)

    assert isinstance(minimizer, SharpnessAware)
    assert minimizer.rho == 0.6
