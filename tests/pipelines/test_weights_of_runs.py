"""Runs store which weight set of a checkpoint they used, and initialize a new classifier from their seed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from saqcli.models import networks
from saqcli.models.networks import NetworkEntry
from saqcli.runs.directory import RunDirectory
from tests.support.command_line import answer, last_error, saq

SIDE, CLASSES = 8, 2


class Tiny(nn.Module):
    def __init__(self, num_classes: int = CLASSES, in_chans: int = 3) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(in_chans, 4, 3), nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


def bright(sign: int) -> dict[str, Tensor]:
    """Weights that separate bright images from dark ones, or swap them with sign -1."""
    state = Tiny().state_dict()
    state["conv.weight"] = torch.ones_like(state["conv.weight"]) / 27
    state["conv.weight"][2:] *= -1
    state["conv.bias"] = torch.zeros(4)
    state["fc.weight"] = sign * torch.tensor([[1.0, 1, -1, -1], [-1, -1, 1, 1]])
    state["fc.bias"] = torch.zeros(2)
    return state


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Images of two classes, a checkpoint whose averaged weights classify them, and a 4-bit run."""
    entry = NetworkEntry(Tiny, CLASSES, "", (0.5,) * 3, (0.5,) * 3, (3, SIDE, SIDE))
    monkeypatch.setitem(networks.NETWORKS, "tiny", entry)
    numbers = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, level in (("bright", 160), ("dark", 60)):
            (folder := tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(8):
                pixels = numbers.integers(level - 40, level + 40, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    torch.save({"state_dict": bright(-1), "state_dict_ema": bright(1)}, tmp_path / "w.pth.tar")
    named = ["--weights", tmp_path / "w.pth.tar", "--data", tmp_path / "data", "--batch-size", 4]
    return ["saq/tiny", *map(str, named), "--bits", "4", "--no-export"]


def test_run_keeps_its_weights_key(options: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    averaged = answer("quantize", *options, "--epochs", 0, "--run-dir", tmp_path / "averaged")
    assert averaged["float_top1"] == 100
    raw = answer("quantize", *options, "--epochs", 0, "--weights-key", "state_dict", "--run-dir", run)
    assert raw["float_top1"] == 0
    assert RunDirectory.open(run).config().model.weights_key == "state_dict"
    assert answer("rerun", run)["identical"]
    other = saq(
        "quantize", *options, "--epochs", 0, "--weights-key", "state_dict_ema", "--run-dir", run, "--resume"
    )
    assert "model.weights_key: state_dict -> state_dict_ema" in last_error(other)


def test_new_head_is_trained_and_reproducible(options: list[str], tmp_path: Path) -> None:
    torch.save({"model": Tiny(num_classes=5).state_dict()}, tmp_path / "w.pth.tar")
    refused = saq("quantize", *options, "--num-classes", 2, "--run-dir", tmp_path / "run", "--quiet")
    assert "has 5 classes, saq/tiny was built for 2" in last_error(refused)
    assert "--new-head" in last_error(refused)
    head = ["--num-classes", "2", "--new-head"]
    untrained = saq("quantize", *options, *head, "--epochs", 0, "--run-dir", tmp_path / "run", "--quiet")
    assert "remove --epochs 0" in last_error(untrained)
    found = saq("quantize", *options, *head, "--epochs", 8, "--lr", 0.5, "--run-dir", tmp_path / "run")
    assert found.exit_code == 0, found.stderr
    assert "another classifier: the new one of 2 classes starts with random weights" in found.stderr
    results = json.loads((tmp_path / "run" / "manifest.json").read_text())["results"]
    assert results["top1"] == 100
    assert answer("rerun", tmp_path / "run")["identical"]
