"""Resolution of network names in the spellings of people and other programs."""

from pathlib import Path

import pytest

from saqcli.errors import UnknownModel
from saqcli.models.names import resolve
from tests.support.command_line import last_error, saq

WRITTEN = {
    "resnet18": "timm/resnet18",
    "torchvision/resnet18": "torchvision/resnet18",
    "timm/resnet18.a1_in1k": "timm/resnet18.a1_in1k",
    "resnet-18": "timm/resnet18",
    "ResNet18": "timm/resnet18",
    "RESNET_18": "timm/resnet18",
    "ResNet-50": "timm/resnet50",
    "resnet18()": "timm/resnet18",
    "hf_hub:timm/resnet18.a1_in1k": "timm/resnet18.a1_in1k",
    "hf-hub:timm/resnet18.a1_in1k@main": "timm/resnet18.a1_in1k",
    "https://huggingface.co/timm/resnet18.a1_in1k": "timm/resnet18.a1_in1k",
    "timm.resnet18": "timm/resnet18",
    "timm.models.resnet.resnet18": "timm/resnet18",
    "Timm/ResNet18.A1_IN1K": "timm/resnet18.a1_in1k",
    "torchvision.models.resnet18": "torchvision/resnet18",
    "models.resnet18": "torchvision/resnet18",
    "torchvision:resnet18": "torchvision/resnet18",
    "TorchVision/ResNet50.imagenet1k_v1": "torchvision/resnet50.IMAGENET1K_V1",
    "MobileNetV2": "torchvision/mobilenet_v2",
    "ViT-B/16": "torchvision/vit_b_16",
    "squeezenet1.1": "torchvision/squeezenet1_1",
    "EfficientNet-B0": "timm/efficientnet_b0",
    "PreResNet-20": "saq/preresnet20",
    "SAQ/resnet20": "saq/resnet20",
}


@pytest.mark.parametrize("asked", WRITTEN)
def test_spelling_variants_are_resolved(asked: str) -> None:
    found = resolve(asked)
    assert f"{found.prefix}/{found.name}" == WRITTEN[asked]
    plain = asked in (WRITTEN[asked], WRITTEN[asked].partition("/")[2])
    assert found.note == ("" if plain else f"{asked} is read as {WRITTEN[asked]}")


@pytest.mark.parametrize(("asked", "said"), [
    ("hf-hub:microsoft/resnet-18", "`model.weights=FILE`"),
    ("microsoft/resnet-18", "did you mean timm/resnet18"),
    ("hub/resnet18", "did you mean timm/resnet18"),
    ("w.safetensors", "name its network, and use `model.weights=w.safetensors`"),
    ("folder/model_best.pth.tar", "`model.weights=folder/model_best.pth.tar`"),
    ("net.onnx", "is an ONNX file"),
    ("", "no similar name"),
    ("-", "no similar name"),
])  # fmt: skip
def test_invalid_name_error_gives_advice(asked: str, said: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        resolve(asked)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "command", [("profile",), ("quantize", "--bits=4", "--data=."), ("search", "--budget=w4a4", "--data=.")]
)
def test_weight_file_suggests_weights_option(command: tuple[str, ...], tmp_path: Path) -> None:
    (path := tmp_path / "weights.pth").write_bytes(b"")
    verb, *options = command
    result = saq(verb, path, *options, "--quiet")
    assert result.exit_code == 1
    assert f"--weights {path}" in last_error(result)
