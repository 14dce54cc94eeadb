"""Fine-tuning learns from the float network where that is trained, unless asked otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saqcli.config import RunConfig, resolve
from saqcli.pipelines.quantize import load_teacher
from saqcli.pipelines.setup import load_float
from saqcli.progress import SILENT


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    save_file(load_float(settings(None).model, SILENT).model.state_dict(), path)
    return path


def settings(weights: Path | None, **more: Any) -> RunConfig:
    options: dict[str, Any] = {"model.name": "saq/resnet20", "model.weights": weights and str(weights)}
    return resolve(options={**options, "model.pretrained": weights is not None, **more})


@pytest.mark.parametrize(
    ("trained", "asked", "distills"),
    [(True, None, True), (True, False, False), (True, True, True), (False, None, False)],
)
def test_trained_networks_teach(weights: Path, trained: bool, asked: bool | None, distills: bool) -> None:
    config = settings(weights if trained else None, **{"training.distill": asked})
    assert (load_teacher(config, torch.device("cpu"), SILENT) is not None) is distills


def test_new_classifier_does_not_teach(weights: Path) -> None:
    config = settings(weights, **{"model.num_classes": 3, "model.new_head": True})
    assert load_teacher(config, torch.device("cpu"), SILENT) is None


@pytest.mark.parametrize("recipe", ["paper-cifar", "paper-imagenet"])
def test_published_recipes_learn_from_labels_alone(recipe: str) -> None:
    assert resolve(recipe=recipe, options={"model.name": "saq/resnet20"}).training.distill is False
