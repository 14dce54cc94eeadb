"""Builder arguments allowed in metadata, and networks checked on the meta device before they are built."""

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks

from saqcli.errors import ConfigError, CorruptArtifact, SaqError
from saqcli.models.arguments import MAX_NUMBER, RESERVED, check_arguments
from saqcli.models.load import ModelSpec, build_architecture, load_model
from saqcli.models.rebuild import _limited_size, check_build_metadata, rebuild_from_metadata

IMAGES = {
    "input_size": [3, 8, 8],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
RESNET = {"name": "saq/resnet20", "num_classes": 5, "in_chans": 3, "kwargs": {}}


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"drop_rate": 0.1, "img_size": [96, 128], "global_pool": "avg", "qkv_bias": False, "depths": (2, 2)},
        {"arch_def": [["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r2_k3_s2_e6_c24"]], "act_layer": "hard_swish"},
        {
            "norm_kwargs": {"eps": 1e-6},
            "drop_path_rate": None,
            "window_size": -1,
            "pretrained_window_sizes": [12],
        },
    ],
)
def test_architecture_arguments_are_accepted(kwargs: dict[str, Any]) -> None:
    check_arguments("timm/any", kwargs)


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_arguments_are_always_refused(name: str) -> None:
    for value in (None, False, True, "", {}):
        with pytest.raises(ConfigError, match=f"cannot take {name} as a model argument"):
            check_arguments("timm/any", {name: value})


@pytest.mark.parametrize(
    "value",
    [
        "/etc/passwd",
        "a/b",
        "a\\b",
        "https:",
        "a\nb",
        "é",
        "a" * 201,
        float("nan"),
        float("-inf"),
        MAX_NUMBER + 1,
        -(10**40),
        10**5000,
        [[[[[1]]]]],
        {"a/b": 1},
        {"": 1},
        {1: 1},
        [0] * 2000,
        object(),
        nn.ReLU,
        b"bytes",
    ],
    ids=range(20),
)
def test_non_plain_values_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="cannot take") as refusal:
        check_arguments("timm/any", {"argument": value})
    assert len(str(refusal.value)) < 200


def test_user_arguments_follow_the_same_rules() -> None:
    """A model that could not be loaded again is not quantized in the first place."""
    with pytest.raises(ConfigError, match="cannot take scriptable"):
        load_model(ModelSpec("saq/resnet20", pretrained=False, kwargs={"scriptable": True}))


@pytest.mark.parametrize("name", ["saq/resnet20", "timm/test_resnet", "torchvision/regnet_x_400mf"])
def test_model_is_rebuilt_from_metadata(name: str) -> None:
    """The last one computes with numbers during construction and so cannot be built on meta."""
    build = RESNET | {"name": name}
    state = build_architecture(build).state_dict()
    model = rebuild_from_metadata(build, IMAGES | {"input_size": [3, 32, 32]}, state)

    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert not model.training


def test_saq_and_timm_networks_pass_the_limit() -> None:
    """Networks with position tables, windows, relative positions, pruned layers, several heads."""
    for name, side in (
        ("saq/mobilenetv2_cifar", 32),
        ("timm/ecaresnet50d_pruned", 64),
        ("timm/swin_tiny_patch4_window7_224", 224),
        ("timm/beit_base_patch16_224", 224),
    ):
        build = RESNET | {"name": name}
        with torch.device("meta"):
            state = build_architecture(build).state_dict()
        packed = {key: torch.empty(value.numel() // 4 + 1, dtype=torch.uint8) for key, value in state.items()}
        rebuild_from_metadata(build, IMAGES | {"input_size": [3, side, side]}, packed)


@pytest.mark.parametrize("name", ["saq/resnet56", "timm/resnet18", "torchvision/regnet_x_400mf"])
def test_oversized_network_is_stopped_while_built(name: str) -> None:
    few = {"a": torch.zeros(10)}
    with pytest.raises(SaqError) as refusal:
        rebuild_from_metadata(RESNET | {"name": name, "num_classes": 10**6}, IMAGES, few)
    assert isinstance(refusal.value, CorruptArtifact)
    assert "a larger network" in str(refusal.value)


def test_limit_is_removed_after_construction() -> None:
    with pytest.raises(CorruptArtifact):
        rebuild_from_metadata(RESNET | {"num_classes": 10**6}, IMAGES, {})

    assert not hooks._global_parameter_registration_hooks
    assert not hooks._global_buffer_registration_hooks


def test_limit_applies_to_one_thread_only() -> None:
    built: list[nn.Module] = []
    with _limited_size(1, 1):
        other = threading.Thread(target=lambda: built.append(nn.Linear(2000, 2000)))
        other.start()
        other.join()
        with pytest.raises(CorruptArtifact):
            nn.Linear(2000, 2000)

    assert len(built) == 1


@pytest.mark.parametrize(
    ("build", "images"),
    [
        ({"in_chans": 1}, {}),
        ({"num_classes": 0}, {}),
        ({"num_classes": True}, {}),
        ({"kwargs": []}, {}),
        ({"name": None}, {}),
        ({}, {"input_size": [3, 5000, 8]}),
        ({}, {"crop_pct": 1e-4}),
        ({}, {"mean": [float("nan")] * 3}),
        ({}, {"std": [0.0] * 3}),
        ({}, {"interpolation": "magic"}),
        ({}, {"surprise": 1}),
        ({}, {"input_size": [3, 8, float("inf")]}),
    ],
)
def test_contradictory_metadata_is_refused(build: dict[str, Any], images: dict[str, Any]) -> None:
    with pytest.raises(SaqError):
        check_build_metadata(RESNET | build, IMAGES | images)
