"""Fine-tuning learns from the float network where that is trained, unless asked otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saqcli.config import RunConfig, recipes, resolve
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


@pytest.mark.parametrize("recipe", [name for name in recipes() if name.startswith(("paper-", "later-"))])
def test_published_recipes_learn_from_labels_alone(recipe: str) -> None:
    assert resolve(recipe=recipe, options={"model.name": "saq/resnet20"}).training.distill is False


def test_methods_that_ascend_learn_from_labels_alone(weights: Path) -> None:
    config = settings(weights, **{"training.method": "saq"})
    assert load_teacher(config, torch.device("cpu"), SILENT) is None


def test_method_in_a_file_gives_way_to_settings_of_perturbations(tmp_path: Path) -> None:
    """A run's config.json names a method in any case."""
    named = {"model.name": "saq/resnet20"}
    file = tmp_path / "config.json"
    for method, found in (("qat", "saq"), ("asaq", "asaq")):
        text = resolve(options={**named, "training.method": method, "training.sam_interval": 1}).to_json()
        file.write_text(text, encoding="utf-8")
        again = resolve(file=file, options=named)
        assert again.training.method == method
        assert resolve(file=file, options={**named, "training.rho": 0.3}).training.method == found


@pytest.mark.parametrize("recipe", ["quick", "minutes", "seconds"])
def test_short_recipes_train_plainly(recipe: str) -> None:
    options = {"model.name": "saq/resnet20", "training.epochs": 2}
    assert resolve(recipe=recipe, options=options).training.method == "qat"


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({}, "qat"),
        ({"sam_interval": 1, "perturb": "all"}, "qat"),  # as they are by default
        ({"epochs": 2, "sharpness_batch": 64}, "qat"),
        ({"rho": 0.3}, "saq"),
        ({"ascent_fraction": 0.25}, "saq"),
        ({"minimizer.bn_second_pass": "update"}, "saq"),
        ({"rho": 0.3, "method": "asaq"}, "asaq"),
        ({"rho": 0.3, "method": "qat"}, "qat"),
    ],
)
def test_settings_of_perturbations_choose_saq(tmp_path: Path, given: dict[str, Any], method: str) -> None:
    options = {f"training.{name}": value for name, value in given.items()}
    named = {"model.name": "saq/resnet20"}
    assert resolve(options={**named, **options}).training.method == method
    assert (
        resolve(options=named, assignments={k: str(v) for k, v in options.items()}).training.method == method
    )
    file = tmp_path / "settings.toml"
    lines = (f"{key} = {value!r}\n" for key, value in options.items())
    file.write_text("".join(lines), encoding="utf-8")
    assert resolve(options=named, file=file).training.method == method


def test_long_recipes_are_sharpness_aware() -> None:
    for recipe in ("cifar", "imagenet", "vit", "paper-cifar"):
        assert resolve(recipe=recipe, options={"model.name": "saq/resnet20"}).training.method == "saq"
