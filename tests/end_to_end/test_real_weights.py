"""Pretrained networks on real images reproduce published figures.

The archives and weights are stored beside the repository; without them these tests are skipped.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from saqcli.cli import app
from saqcli.config import RunConfig, resolve
from saqcli.data.datasets import open_split
from saqcli.data.splits import Images, validation_loader
from saqcli.pipelines.bits import given_policy
from saqcli.pipelines.calibration import calibrate, install_quantizers
from saqcli.pipelines.quantize import prepare
from saqcli.progress import SILENT
from saqcli.training.loop import score


def saq(*arguments: object) -> Any:
    """Run a command, which must succeed, and return its JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def tenth(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tenth image, evenly over the classes."""
    folder = tmp_path_factory.mktemp("tenth")
    for label in sorted((cifar10 / "test").iterdir()):
        (folder / "test" / label.name).mkdir(parents=True)
        for image in sorted(label.iterdir())[::10]:
            (folder / "test" / label.name / image.name).symlink_to(image)
    return folder


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 8,000 test images as PNG files, and some of them again as training images for calibration."""
    from tests.conftest import shared_data

    data = shared_data() / "data"
    folder = tmp_path_factory.mktemp("cifar10")
    archives = [str(data / "cifar10" / "test.tar")]
    subprocess.run([sys.executable, str(data / "unpack.py"), str(folder), *archives], check=True)
    for label in sorted((folder / "test").iterdir()):
        (folder / "train" / label.name).mkdir(parents=True)
        for image in sorted(label.iterdir())[::16]:
            (folder / "train" / label.name / image.name).write_bytes(image.read_bytes())
    return folder


def test_resnet20_accuracy_on_a_tenth(tenth: Path, shared: Path) -> None:
    weights = shared / "data" / "weights" / "cifar10_resnet20.safetensors"

    found = saq("eval", "saq/resnet20", "--weights", weights, "--data", tenth)

    assert found["images"] == 800
    assert found["top1"] == pytest.approx(90.625, abs=0.13)  # one image; of all 8,000: 91.67


@pytest.mark.slow
def test_resnet20_accuracy_matches_the_paper(cifar10: Path, shared: Path) -> None:
    weights = shared / "data" / "weights" / "cifar10_resnet20.safetensors"

    found = saq("eval", "saq/resnet20", "--weights", weights, "--data", cifar10)

    assert found["images"] == 8000
    assert found["top1"] == pytest.approx(91.67, abs=0.03)


@pytest.mark.slow
def test_resnet20_4_bits_loses_under_6_points(cifar10: Path, shared: Path, tmp_path: Path) -> None:
    weights = shared / "data" / "weights" / "cifar10_resnet20.safetensors"
    options = ("--weights", weights, "--data", cifar10, "--epochs", 0, "--run-dir", tmp_path / "run")

    found = saq("quantize", "saq/resnet20", *options, "--bits", 4)
    onnx = saq("eval", found["artifacts"]["qdq"], "--data", cifar10)

    assert found["bops"] == 670_081_024
    assert found["top1"] > found["float_top1"] - 6
    assert onnx["top1"] == pytest.approx(found["top1"], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "weights", "options", "top1"),
    [
        ("torchvision/squeezenet1_1", "imagenet_squeezenet1_1", [], 59.75),
        (
            "timm/mobilenetv2_100",
            "imagenet_mobilenetv2_100_from_int8",
            ["--model-kwargs", "pad_type=same,bn_eps=0.001", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"],
            67.5,
        ),
    ],
)
def test_imagenet_accuracy_on_some_classes(
    model: str, weights: str, options: list[str], top1: float, shared: Path, tmp_path: Path
) -> None:
    data = shared / "data"
    subprocess.run(["tar", "xf", data / "imagenette" / "val.tar", "-C", tmp_path], check=True)

    found = saq(
        "eval", model, "--weights", data / "weights" / f"{weights}.safetensors", "--data", tmp_path, *options
    )

    assert found["images"] == 400
    assert found["top1"] == pytest.approx(top1, abs=0.26)  # one image


def top1(model: nn.Module, folders: list[Path], classes: int, config: RunConfig, images: Images) -> float:
    """Percent of all images in ``folders``."""
    right = count = 0.0
    for folder in folders:
        split = open_split(str(folder), "val", num_classes=classes)
        loader = validation_loader(split, images.preprocessing, config.data, torch.device("cpu"))
        found = score(model, loader, "", torch.device("cpu"), SILENT)
        right, count = right + found.top1 / 100 * found.images, count + found.images
    return 100 * right / count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "weights", "options"),
    [
        ("torchvision/squeezenet1_1", "imagenet_squeezenet1_1", {}),
        ("saq/mobilenetv1_025", "imagenet_mobilenetv1_025", {}),
        (
            "timm/mobilenetv2_100",
            "imagenet_mobilenetv2_100_from_int8",
            {
                "model.kwargs": {"pad_type": "same", "bn_eps": 0.001},
                "model.mean": (0.5, 0.5, 0.5),
                "model.std": (0.5, 0.5, 0.5),
            },
        ),
        ("saq/vit_cifar", "cifar10_vit_postnorm", {}),
    ],
)
def test_int8_loses_under_three_quarter_points(
    model: str, weights: str, options: dict[str, Any], shared: Path, tmp_path: Path
) -> None:
    data = shared / "data"
    if "cifar" in model:
        archives = [data / "cifar10" / "train.tar", data / "cifar10" / "test.tar"]
        subprocess.run([sys.executable, data / "unpack.py", tmp_path, *archives], check=True)
        folders = [tmp_path / "test"]
    else:
        for part in ("train", "val"):
            (tmp_path / part).mkdir()
            archive = data / "imagenette" / f"{part}.tar"
            subprocess.run(["tar", "xf", archive, "-C", tmp_path / part], check=True)
        (tmp_path / "sample").mkdir()
        archive = data / "imagenet-sample" / "images.tar"
        subprocess.run(["tar", "xf", archive, "-C", tmp_path / "sample"], check=True)
        folders = [tmp_path / "val", tmp_path / "sample"]
    named = {
        "model.name": model,
        "model.weights": str(data / "weights" / f"{weights}.safetensors"),
        "data.path": str(tmp_path),
        "quantization.bits": "8",
    }
    config = resolve(options=named | options)
    network, images = prepare(config, torch.device("cpu"), SILENT)
    classes = network.loaded.num_classes
    in_float = top1(network.model, folders, classes, config, images)
    policy = given_policy(config.quantization, network)
    assert policy is not None
    statistics = calibrate(network, images, config, SILENT)
    quantized = install_quantizers(config, network, policy, statistics, images, SILENT)

    assert top1(quantized, folders, classes, config, images) >= in_float - 0.75
