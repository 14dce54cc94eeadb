"""From name to model: name resolution, weight sources, preprocessing and rebuilding."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saqcli.errors import ConfigError, SaqError, UnknownModel, UnsupportedModel, WeightsMismatch
from saqcli.models.load import ModelSpec, Preprocessing, build_architecture, load_model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def random(name: str, **spec: Any) -> ModelSpec:
    return ModelSpec(name, pretrained=False, **spec)


def refusal(spec: ModelSpec, kind: type[SaqError]) -> str:
    with pytest.raises(kind) as caught:
        load_model(spec)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("resnet18", "timm/resnet18"),
        ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("torchvision/resnet18", "torchvision/resnet18"),
        ("mobilenet_v2.IMAGENET1K_V1", "torchvision/mobilenet_v2.IMAGENET1K_V1"),
        ("squeezenet1_1", "torchvision/squeezenet1_1"),  # timm has none
        ("preresnet20", "saq/preresnet20"),
        ("saq/mobilenetv2_cifar", "saq/mobilenetv2_cifar"),
    ],
)
def test_name_lookup_order(asked: str, found: str) -> None:
    loaded = load_model(random(asked))
    assert (loaded.name, loaded.weights_source, loaded.weights_sha256) == (found, "random", None)
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("resnet81", "timm/resnet"),
        ("timm/resnet18.a9_in1k", "timm/resnet18.a1_in1k"),
        ("torchvision/resnet50.IMAGENET1K_V9", "torchvision/resnet50.IMAGENET1K_V1"),
        ("saq/preresnet21", "saq/preresnet20"),
        ("mobilenetv2_100d", "timm/mobilenetv2_100"),
        ("hub/resnet18", "timm/resnet18"),
        ("", "no similar name"),
    ],
)
def test_unknown_name_suggests_similar_ones(asked: str, near: str) -> None:
    message = refusal(random(asked), UnknownModel)
    assert near in message
    assert "saq models" in message


@pytest.mark.parametrize(
    ("spec", "input_size", "crop_pct"),
    [
        (random("timm/resnet18"), (3, 224, 224), 0.95),
        (random("timm/resnet18", input_size=288), (3, 288, 288), 1.0),  # timm's test-time size and crop
        (random("timm/resnet18", input_size=(96, 128)), (3, 96, 128), 0.95),
        (random("torchvision/resnet18"), (3, 224, 224), 224 / 256),
        (random("torchvision/mobilenet_v2"), (3, 224, 224), 224 / 232),
        (random("torchvision/mobilenet_v2.IMAGENET1K_V1"), (3, 224, 224), 224 / 256),
        (random("saq/resnet20"), (3, 32, 32), 1.0),
    ],
)
def test_preprocessing_matches_published_weights(
    spec: ModelSpec, input_size: tuple[int, ...], crop_pct: float
) -> None:
    found = load_model(spec).preprocessing
    assert (found.input_size, found.crop_pct) == (input_size, pytest.approx(crop_pct))
    assert (found.mean, found.std) == IMAGENET


def test_preprocessing_can_be_overridden() -> None:
    found = load_model(
        random("saq/resnet20", mean=(0.5,) * 3, std=(0.25,) * 3, input_size=(3, 64, 48))
    ).preprocessing
    assert (found.mean, found.std, found.input_size) == ((0.5,) * 3, (0.25,) * 3, (3, 64, 48))


def test_preprocessing_follows_channel_count() -> None:
    loaded = load_model(random("timm/resnet18", in_chans=1))
    assert loaded.preprocessing.input_size == (1, 224, 224)
    assert loaded.preprocessing.mean == pytest.approx((0.449,))
    assert loaded.model(torch.randn(1, 1, 32, 32)).shape == (1, 1000)


def test_preprocessing_survives_json() -> None:
    found = load_model(random("timm/resnet18")).preprocessing
    assert Preprocessing.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": 1}, "colour is unknown"),
        ({"mean": None}, "mean"),
        ({"mean": [0.5]}, "one number per channel"),
        ({"std": [1, 1, 0]}, "above 0"),
        ({"input_size": [3, 0, 224]}, "above 0"),
        ({"input_size": [224, 224]}, "cannot be read"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"interpolation": "magic"}, "bicubic"),
        ({"crop_mode": "magic"}, "center"),
    ],
)
def test_invalid_preprocessing_is_refused(change: dict[str, Any], said: str) -> None:
    good = Preprocessing((3, 32, 32), *IMAGENET, interpolation="bilinear", crop_pct=1.0).to_dict()
    with pytest.raises(ConfigError, match=said):
        Preprocessing.from_dict(good | change)


def test_preprocessing_with_missing_key_fails() -> None:
    with pytest.raises(ConfigError, match="std is missing"):
        Preprocessing.from_dict(
            {
                "input_size": [3, 1, 1],
                "mean": [0, 0, 0],
                "interpolation": "box",
                "crop_pct": 1,
                "crop_mode": "center",
            }
        )


@pytest.mark.parametrize(
    "spec",
    [
        random("timm/test_resnet", num_classes=7, in_chans=1, kwargs={"drop_rate": 0.1}),
        random("timm/test_vit", input_size=96),
        random("torchvision/squeezenet1_1", num_classes=7),
        random("torchvision/vit_b_16", input_size=32, num_classes=2),
        random("saq/preresnet20", num_classes=5),
    ],
)
def test_architecture_is_rebuilt_from_json(spec: ModelSpec) -> None:
    loaded = load_model(spec)
    again = build_architecture(json.loads(json.dumps(loaded.build)))
    again.load_state_dict(loaded.model.state_dict(), strict=True)
    assert not again.training
    images = torch.randn(2, *loaded.preprocessing.input_size)
    with torch.no_grad():
        scores = again(images)
        assert scores.shape == (2, loaded.num_classes)
        assert torch.equal(scores, loaded.model(images))


def test_architecture_with_unknown_key_fails() -> None:
    with pytest.raises(ConfigError, match="in_chans"):
        build_architecture({"name": "saq/resnet20", "num_classes": 10, "kwargs": {}})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (random("timm/resnet18", kwargs={"foo": 1}), "no argument 'foo'"),
        (random("torchvision/resnet18", kwargs={"foo": 1}), "no argument 'foo'"),
        (random("saq/resnet20", kwargs={"foo": 1}), "no argument 'foo'"),
        (random("timm/resnet18", kwargs={"checkpoint_path": "x"}), "`model.weights`"),
        (random("timm/resnet18", kwargs={"num_classes": 3}), "`model.num_classes`"),
        (random("timm/resnet18", kwargs={"block_args": 5}), "`model.kwargs`"),
        (random("torchvision/googlenet", in_chans=1), "use the network of timm/"),
        (random("saq/resnet20", num_classes=0), "at least 1"),
        (random("saq/resnet20", input_size=-4), "one side"),
        (random("saq/resnet20", mean=(0.5,)), "one number per channel"),
    ],
)
def test_invalid_arguments_are_refused(spec: ModelSpec, said: str) -> None:
    assert said in refusal(spec, ConfigError)


def test_headless_network_needs_num_classes() -> None:
    assert "`model.num_classes`" in refusal(random("timm/vit_small_patch16_224.dino"), UnsupportedModel)


def test_arguments_reach_the_builder() -> None:
    model = load_model(random("timm/mobilenetv2_100", kwargs={"pad_type": "same", "bn_eps": 0.001})).model
    assert type(model.conv_stem).__name__ == "Conv2dSame"
    assert model.bn1.eps == 0.001


@pytest.mark.parametrize(
    ("name", "classes", "inferred"),
    [("saq/resnet20", None, 12), ("timm/test_resnet", None, 12), ("torchvision/squeezenet1_1", None, 12),
     ("timm/test_resnet", 12, 12)],
)  # fmt: skip
def test_file_determines_num_classes(tmp_path: Path, name: str, classes: int | None, inferred: int) -> None:
    original = load_model(random(name, num_classes=12))
    torch.save({"state_dict": original.model.state_dict()}, path := tmp_path / "w.pth")
    loaded = load_model(ModelSpec(name, weights=path, num_classes=classes))
    assert (loaded.num_classes, loaded.weights_source, loaded.build["num_classes"]) == (
        inferred,
        "w.pth",
        inferred,
    )
    assert len(loaded.weights_sha256 or "") == 64
    assert bool(loaded.notes) == (classes is None)
    images = torch.randn(2, *loaded.preprocessing.input_size)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), original.model(images))


def test_num_classes_unlike_the_file_is_refused(tmp_path: Path) -> None:
    save_file(
        load_model(random("timm/resnet18", num_classes=10)).model.state_dict(),
        path := tmp_path / "w.safetensors",
    )
    message = refusal(ModelSpec("resnet18", weights=path, num_classes=100), WeightsMismatch)
    assert message.startswith("w.safetensors has 10 classes, timm/resnet18 was built for 100")
    assert "`model.new_head=True`" in message


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(load_model(random("saq/resnet20")).model.state_dict(), path := tmp_path / "w.safetensors")
    assert "does not fit saq/resnet32" in refusal(ModelSpec("saq/resnet32", weights=path), WeightsMismatch)
    assert "does not fit timm/test_resnet" in refusal(
        ModelSpec("timm/test_resnet", weights=path), WeightsMismatch
    )


def test_timm_converts_weights_to_input_size(tmp_path: Path) -> None:
    save_file(load_model(random("timm/test_vit")).model.state_dict(), path := tmp_path / "w.safetensors")
    loaded = load_model(ModelSpec("timm/test_vit", weights=path, input_size=96))
    assert "converted" in loaded.notes[0]
    assert loaded.model(torch.randn(1, 3, 96, 96)).shape == (1, 1000)


FIRST = {"timm/test_resnet": "conv1.0", "torchvision/squeezenet1_1": "features.0", "saq/resnet20": "conv1"}


@pytest.mark.parametrize("name", FIRST)
def test_grey_input_sums_the_colour_channels(name: str, tmp_path: Path) -> None:
    first, colour = f"{FIRST[name]}.weight", load_model(random(name)).model
    save_file(colour.state_dict(), path := tmp_path / "w.safetensors")
    grey, four = (load_model(ModelSpec(name, weights=path, in_chans=channels)) for channels in (1, 4))
    weight = colour.state_dict()[first]
    assert torch.equal(grey.model.state_dict()[first], weight.sum(1, keepdim=True))
    assert torch.equal(four.model.state_dict()[first], weight[:, [0, 1, 2, 0]] * 3 / 4)
    assert grey.notes == ["w.safetensors reads images of 3 channels: summed over its channels to read 1"]
    side = grey.preprocessing.input_size[1]
    image = torch.randn(1, 1, side, side)
    with torch.no_grad():
        torch.testing.assert_close(
            grey.model(image), colour(image.expand(1, 3, side, side)), rtol=1e-3, atol=1e-4
        )


def test_grey_weights_suggest_in_chans(tmp_path: Path) -> None:
    save_file(
        load_model(random("saq/resnet20", in_chans=1)).model.state_dict(), path := tmp_path / "w.safetensors"
    )
    message = refusal(ModelSpec("saq/resnet20", weights=path), WeightsMismatch)
    assert (
        "reads images of 1 channel (conv1.weight), saq/resnet20 was built for 3: use `model.in_chans=1`"
        in message
    )


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/squeezenet1_1", "saq/resnet20"])
def test_new_head_is_randomly_initialized(name: str, tmp_path: Path) -> None:
    original = load_model(random(name, num_classes=12))
    save_file(original.model.state_dict(), path := tmp_path / "w.safetensors")
    loaded = load_model(ModelSpec(name, weights=path, num_classes=7, new_head=True))
    own, theirs = loaded.model.state_dict(), original.model.state_dict()
    other = {key for key in own if own[key].shape != theirs[key].shape}
    assert {key.rpartition(".")[0] for key in other} == set(loaded.classifiers)
    assert all(torch.equal(own[key], theirs[key]) for key in own.keys() - other)
    assert (loaded.num_classes, loaded.trained) == (7, False)
    assert loaded.notes == [
        "w.safetensors has another classifier: the new one of 7 classes starts with random weights"
    ]
    same = load_model(ModelSpec(name, weights=path, num_classes=12, new_head=True))
    assert same.trained
    assert torch.equal(same.model.state_dict()[next(iter(other))], theirs[next(iter(other))])


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        (ModelSpec("saq/resnet20"), "cifar10_resnet20"),
        (ModelSpec("torchvision/squeezenet1_1"), "imagenet_squeezenet1_1"),
        (
            ModelSpec("timm/mobilenetv2_100", kwargs={"pad_type": "same", "bn_eps": 0.001}, mean=(0.5,) * 3),
            "imagenet_mobilenetv2_100_from_int8",
        ),
    ],
)
def test_real_weights_load(shared: Path, spec: ModelSpec, file: str) -> None:
    loaded = load_model(replace(spec, weights=shared / "data" / "weights" / f"{file}.safetensors"))
    assert loaded.notes == []
    assert loaded.weights_source == f"{file}.safetensors"


def offline(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The error for published weights without cache and network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # no server listens there
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    started = time.perf_counter()
    message = refusal(ModelSpec(name), SaqError)
    assert time.perf_counter() - started < 10
    return message


@pytest.mark.parametrize("name", ["timm/test_resnet.r160_in1k", "torchvision/squeezenet1_1"])
def test_offline_error_suggests_weights(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = offline(name, monkeypatch, tmp_path)
    assert f"the pretrained weights of {name} could not be fetched" in message
    assert "`model.weights=FILE`" in message
    assert "`model.pretrained=False`" in message


@pytest.mark.parametrize("name", ["saq/resnet20", "timm/coatnet_0_224"])
def test_network_without_published_weights(name: str) -> None:
    message = refusal(ModelSpec(name), SaqError)
    assert message.startswith(f"{name} has no published weights: use `model.weights=FILE`")
    assert "`model.pretrained=False`" in message


def test_cached_timm_weights_work_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = load_model(random("timm/test_resnet"))
    folder = tmp_path / "models--timm--test_resnet.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (snapshot := folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(original.model.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = load_model(ModelSpec("timm/test_resnet"))
    assert (loaded.name, loaded.weights_source) == (
        "timm/test_resnet.r160_in1k",
        "timm/test_resnet.r160_in1k",
    )
    assert torch.equal(loaded.model.fc.weight, original.model.fc.weight)
    other = load_model(ModelSpec("timm/test_resnet", num_classes=4))
    assert "with random weights" in other.notes[0]
    assert torch.equal(other.model.conv1[0].weight, original.model.conv1[0].weight)


def test_cached_torchvision_weights_work_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    original = load_model(random("torchvision/squeezenet1_1")).model
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(original.state_dict(), tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    loaded = load_model(ModelSpec("torchvision/squeezenet1_1"))
    assert loaded.weights_source == "SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert torch.equal(loaded.model.classifier[1].weight, original.classifier[1].weight)
    other = load_model(ModelSpec("torchvision/squeezenet1_1", num_classes=4))
    assert "with random weights" in other.notes[0]
    assert torch.equal(other.model.features[0].weight, original.features[0].weight)
    grey = load_model(ModelSpec("torchvision/squeezenet1_1", in_chans=1))
    assert torch.equal(grey.model.features[0].weight, original.features[0].weight.sum(1, keepdim=True))
    assert "to read 1" in grey.notes[0]
