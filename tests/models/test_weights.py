"""Weight files: every layout, and every way they fail."""

import os
import pickle
from argparse import Namespace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from saqcli.errors import ConfigError, CorruptArtifact, SaqError, UnsafeWeights, WeightsMismatch
from saqcli.models.weights import load_into, read_weights, sha256_of


class Touch:
    """Creates ``path`` when unpickled unsafely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def network(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def refusal(path: Path, kind: type[SaqError]) -> str:
    """The message of the error that reading ``path`` raises."""
    with pytest.raises(kind) as caught:
        read_weights(path)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_pickle_is_loaded(tmp_path: Path, suffix: str, zipped: bool) -> None:
    state = network().state_dict()
    torch.save(state, path := tmp_path / f"w{suffix}", _use_new_zipfile_serialization=zipped)
    assert_same(read_weights(path).tensors, state)


def test_safetensors_are_loaded(tmp_path: Path) -> None:
    state = network().state_dict()
    save_file(state, path := tmp_path / "w.safetensors")
    assert_same(read_weights(path).tensors, state)


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_state_dict", "net"])
def test_checkpoint_is_unwrapped(tmp_path: Path, nest: str) -> None:
    state = network().state_dict()
    checkpoint = {"epoch": 3, "best": 91.7, nest: state, "optimizer": {"state": {}, "lr": [0.1]}}
    torch.save(checkpoint, path := tmp_path / "w.pth")
    assert_same(read_weights(path).tensors, state)


@pytest.mark.parametrize("how", ["torch", "legacy torch", "pickle"])
def test_code_is_not_executed(tmp_path: Path, how: str) -> None:
    trace, path = tmp_path / "ran", tmp_path / "w.pth"
    content = {"state_dict": network().state_dict(), "extra": Touch(trace)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    message = refusal(path, UnsafeWeights)
    assert "system" in message
    assert ".safetensors" in message
    assert not trace.exists()


def test_foreign_object_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"args": Decimal(1), "state_dict": network().state_dict()}, path := tmp_path / "w.pth")
    assert "decimal.Decimal" in refusal(path, UnsafeWeights)


def test_training_script_options_are_allowed(tmp_path: Path) -> None:
    """timm's and torchvision's scripts save their parsed options."""
    state = network().state_dict()
    torch.save({"args": Namespace(lr=1), "state_dict": state}, path := tmp_path / "w.pth.tar")
    assert_same(read_weights(path).tensors, state)


def test_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(network(), path := tmp_path / "w.pt")
    assert "Sequential" in refusal(path, UnsafeWeights)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_truncated_file_is_reported_as_damaged(tmp_path: Path, name: str) -> None:
    state, path = network().state_dict(), tmp_path / name
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[:-200])
    assert "damaged" in refusal(path, CorruptArtifact)


@pytest.mark.parametrize("name", ["w.pth", "w.th", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"<html>404</html>", bytes(range(256)) * 8])
def test_garbage_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (path := tmp_path / name).write_bytes(content)
    assert ("damaged" if content else "0 bytes") in refusal(path, CorruptArtifact)


@pytest.mark.parametrize(
    "content",
    [[torch.ones(1)], {}, {"epoch": 3}, {"weight": [1.0]}, {"state_dict": {"w": torch.ones(1), "n": 2}}],
)
def test_content_without_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, path := tmp_path / "w.pth")
    assert "state_dict()" in refusal(path, CorruptArtifact)


def test_missing_or_unknown_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.pth", ConfigError)
    assert "folder" in refusal(tmp_path, ConfigError)
    (tmp_path / "w.onnx").write_bytes(b"x")
    assert ".onnx" in refusal(tmp_path / "w.onnx", ConfigError)


def test_loading_is_exact_without_counters() -> None:
    state = {k: torch.randn_like(v) for k, v in network().state_dict().items() if v.is_floating_point()}
    load_into(model := network(), state, "w.pth")
    assert_same({k: v for k, v in model.state_dict().items() if k in state}, state)


def mismatch(state: dict[str, Tensor], model: nn.Module, **named: Any) -> str:
    with pytest.raises(WeightsMismatch) as caught:
        load_into(model, state, "w.pth", **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mismatch_names_all_kinds_of_tensors() -> None:
    state = network().state_dict()
    del state["0.bias"]
    state["extra"] = torch.ones(1)
    state["0.weight"] = torch.ones(4, 3, 5, 5)
    message = mismatch(state, network(), name="saq/tiny")
    assert "w.pth does not fit saq/tiny" in message
    assert "1 missing (0.bias)" in message
    assert "1 unexpected (extra)" in message
    assert "1 misshapen (0.weight (4, 3, 5, 5) for (4, 3, 3, 3))" in message


def test_long_name_lists_are_truncated() -> None:
    message = mismatch({f"k{i}": torch.ones(1) for i in range(12)}, network())
    assert "12 unexpected (k0, k1, k2, k3, k4 and 7 more)" in message


def test_wrong_num_classes_is_explained() -> None:
    message = mismatch(network(10).state_dict(), network(100), name="saq/tiny", classifiers=("3",))
    assert message.startswith("w.pth has 10 classes, saq/tiny was built for 100: remove `model.num_classes`")
    assert "`model.new_head=True`" in message


def test_sha256_of_the_file(tmp_path: Path) -> None:
    (path := tmp_path / "w").write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_versioned_state_dicts_load(tmp_path: Path) -> None:
    """torchvision's MNASNet requires the version metadata that a plain dictionary lacks."""
    net = torchvision.models.mnasnet0_5()
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    state = read_weights(tmp_path / "weights.safetensors").tensors
    other = torchvision.models.mnasnet0_5()
    load_into(other, state, "weights.safetensors")
    assert torch.equal(other.layers[0].weight, net.layers[0].weight)
