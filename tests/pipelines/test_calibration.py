"""The two corrections after calibration as settings, and their defaults."""

from pathlib import Path

import pytest
import torch
from torch import nn

from saqcli.config import RunConfig, resolve
from saqcli.pipelines.bits import given_policy
from saqcli.pipelines.calibration import calibrate, install_quantizers
from saqcli.pipelines.quantize import prepare
from saqcli.progress import SILENT


def settings(digits: Path, **quantization: object) -> RunConfig:
    options = {
        "model.name": "timm/test_resnet",
        "model.pretrained": False,
        "model.num_classes": 10,
        "model.in_chans": 1,
        "model.input_size": 32,
        "data.path": str(digits / "images"),
        "data.calibration_images": 32,
        "data.workers": 0,
        "quantization.bits": "3",
    }
    return resolve(options=options | {f"quantization.{name}": value for name, value in quantization.items()})


def calibrated(config: RunConfig) -> nn.Module:
    torch.manual_seed(0)
    network, images = prepare(config, torch.device("cpu"), SILENT)
    policy = given_policy(config.quantization, network)
    assert policy is not None
    statistics = calibrate(network, images, config, SILENT)
    return install_quantizers(config, network, policy, statistics, images, SILENT)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_only_requested_corrections_apply(digits: Path, biases: bool, norms: bool) -> None:
    plain = calibrated(settings(digits, correct_bias=False, recalibrate_bn=False)).state_dict()
    corrected = calibrated(settings(digits, correct_bias=biases, recalibrate_bn=norms)).state_dict()
    moved = {
        name.rpartition(".")[2] for name, value in corrected.items() if not torch.equal(value, plain[name])
    }
    expected = {"running_mean"} if biases or norms else set()
    assert moved == expected | ({"bias"} if biases else set()) | ({"running_var"} if norms else set())


def test_recalibrate_bn_default(digits: Path) -> None:
    section = settings(digits).quantization
    assert (section.correct_bias, section.recalibrate_bn) == (False, True)
    published = resolve(recipe="paper-cifar", options={"model.name": "saq/preresnet20"}).quantization
    assert (published.correct_bias, published.recalibrate_bn) == (False, False)
