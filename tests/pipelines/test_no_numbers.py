"""NaN and infinity: refused in inputs, errors when they arise, null in JSON."""

import ast
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import Tensor, nn

import saqcli
from saqcli.cli.console import print_json
from saqcli.models import networks
from saqcli.models.networks import NetworkEntry
from saqcli.quant import convert
from saqcli.quant.calibration import observe
from saqcli.runs.directory import Metrics
from saqcli.serialization import json_text
from tests.support.command_line import last_error, saq

CLASSES, SIDE = 2, 8


class Tiny(nn.Module):
    def __init__(self, num_classes: int = CLASSES, in_chans: int = 3) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(in_chans, 4, 3), nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four images of two classes; a network for them is registered as ``saq/tiny``."""
    entry = NetworkEntry(Tiny, CLASSES, "", (0.5,) * 3, (0.5,) * 3, (3, SIDE, SIDE))
    monkeypatch.setitem(networks.NETWORKS, "tiny", entry)
    numbers = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder := tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = numbers.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "data"


def weights(folder: Path, name: str, value: float, scale: float = 1.0) -> Path:
    """A weight file with one value replaced by ``value`` and the classifier multiplied by ``scale``."""
    torch.manual_seed(0)
    state = Tiny().state_dict()
    state["fc.weight"] *= scale
    state[name].view(-1)[0] = value
    save_file(state, path := folder / "weights.safetensors")
    return path


def commands(path: Path, data: Path, run: Path) -> dict[str, list[Any]]:
    images, given = ["--data", data, "--batch-size", 2], ["--weights", path]
    return {
        "profile": ["profile", "saq/tiny", *given],
        "eval": ["eval", "saq/tiny", *given, *images],
        "quantize": ["quantize", "saq/tiny", *given, *images, "--bits", 4, "--run-dir", run],
        "search": ["search", "saq/tiny", *given, *images, "--budget", "w4a4", "--run-dir", run],
        "analyze": ["analyze", "saq/tiny", *given, *images, "--bits", 4, "--sharpness", "--out", run],
    }


@pytest.mark.parametrize("command", ["profile", "eval", "quantize", "search", "analyze"])
def test_every_command_names_the_nan(command: str, tmp_path: Path, data: Path) -> None:
    path, run = weights(tmp_path, "conv.weight", math.nan), tmp_path / "run"
    result = saq(*commands(path, data, run)[command])
    assert result.exit_code == 1
    assert "conv.weight has NaN values (1 of 108)" in last_error(result)
    assert result.stdout == ""
    assert not run.exists()


@pytest.mark.parametrize("command", ["eval", "quantize", "search", "analyze"])
def test_every_command_reports_overflow(command: str, tmp_path: Path, data: Path) -> None:
    path = weights(tmp_path, "fc.bias", 1e38, scale=1e38)
    result = saq(
        *commands(path, data, tmp_path / "run")[command], "--mean", "-9,-9,-9", "--std", ".01,.01,.01"
    )
    assert result.exit_code == 1
    said = "the loss of saq/tiny is" if command == "eval" else "the class scores are NaN or infinite"
    if command != "quantize":  # it evaluates the float network first
        assert said in last_error(result)
    assert "--mean" in last_error(result)
    assert "nan %" not in result.stdout


def test_overflowing_inputs_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.constant_(model[0].weight, 3e38)  # type: ignore[arg-type]
    convert.wrap(model)
    with pytest.raises(saqcli.errors.UnsupportedModel, match="input of layer 1 is NaN or infinite"):
        observe(model, [torch.ones(1, 3, 8, 8)])


STRANGE = {"nan": math.nan, "inf": [math.inf, (-math.inf, 1.5)], "numpy": np.float64("nan"), "fine": {"x": 1}}
PLAIN = {"nan": None, "inf": [None, [None, 1.5]], "numpy": None, "fine": {"x": 1}}


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"a bare {name}")

    return json.loads(text, parse_constant=refuse)


def test_json_holds_null_for_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert strict(json_text(STRANGE)) == PLAIN
    print_json(STRANGE)
    assert strict(capsys.readouterr().out) == PLAIN
    (metrics := Metrics(tmp_path / "metrics.jsonl")).append(STRANGE)
    assert strict(metrics.text()) == PLAIN


def subclasses(kind: type) -> list[type[BaseModel]]:
    return [each for child in kind.__subclasses__() for each in (child, *subclasses(child))]


def test_pydantic_models_write_null_for_nan() -> None:
    """Pydantic's default unless a model overrides it; none of ours does."""

    class Anything(BaseModel):
        value: float
        tree: dict[str, Any]

    assert strict(Anything(value=math.nan, tree=STRANGE).model_dump_json()) == {"value": None, "tree": PLAIN}
    ours = [each for each in subclasses(BaseModel) if each.__module__.startswith("saqcli.")]
    assert len(ours) > 10
    assert all(each.model_config.get("ser_json_inf_nan", "null") == "null" for each in ours)


def test_json_is_written_in_one_place() -> None:
    root = Path(saqcli.__file__).parent
    makers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in ("dumps", "dump")
        and ast.unparse(node.value) == "json"
    }
    assert makers == {"serialization.py"}
