"""Models that cannot be exported are detected before calibration, and ``--no-export`` skips the check."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.api import exporting
from saqcli.config import resolve
from saqcli.errors import UnsupportedModel
from saqcli.export.qdq import QdqExporter
from saqcli.models.networks import NETWORKS, NetworkEntry
from saqcli.pipelines import calibration
from saqcli.pipelines import quantize as quantizing
from saqcli.pipelines.setup import load_float, wrap_and_trace
from saqcli.progress import SILENT
from saqcli.verify import publish
from tests.support.command_line import answer, last_error, saq

HALF = (0.5, 0.5, 0.5)
CLASSES = 3


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(torch.relu(self.stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


class DecidesByValues(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        logits: Tensor = self.head((2 * y if y.mean() > 1 else y).mean((2, 3)))
        return logits


class ImageByImage(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return torch.cat([self.head(y[k : k + 1].mean((2, 3))) for k in range(len(y))])


class Bessel(Plain):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.special.bessel_j0(self.features(x)).mean((2, 3)))
        return logits


class Random(Plain):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.dropout(self.features(x), 0.5, training=True).mean((2, 3)))
        return logits


class AdaptiveMaxPool(Plain):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.adaptive_max_pool2d(self.features(x), 3).mean((2, 3)))
        return logits


class Largest(Plain):
    """Has an ONNX form, but none that every runtime computes alike."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).flatten(2).topk(4, -1).values.mean(2))
        return logits


class OwnProduct(Plain):
    """A network that itself multiplies with the weight of a layer."""

    def features(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        return torch.relu(F.conv2d(y, self.inner.weight, self.inner.bias, padding=1))


# Cannot be written in any style, and why.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "decides": (DecidesByValues, "its forward depends on the values of a tensor"),
    "image by image": (ImageByImage, "it works for one batch size only"),
    "operator": (Bessel, "ONNX has no form of its operator prims::bessel_j0"),
    "pool": (AdaptiveMaxPool, "ONNX has no form of its operator aten::adaptive_max_pool2d"),
    "random": (Random, "its forward draws random numbers also in eval mode (Dropout)"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("trial") / "images", np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for index in range(count * CLASSES):
            path = folder / split / f"class{index % CLASSES}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
    return folder


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], nn.Module]], str]:
    """Registers a network and returns its name."""

    def known(make: Callable[[], nn.Module]) -> str:
        def build(**_: Any) -> nn.Module:
            torch.manual_seed(0)
            return make()

        entry = NetworkEntry(build, CLASSES, "of a test", HALF, HALF, (3, 8, 8))
        monkeypatch.setitem(NETWORKS, "of_a_test", entry)
        return "saq/of_a_test"

    return known


def options(images: Path, run: Path) -> list[object]:
    return ["--no-pretrained", "--data", images, "--epochs", 0, "--run-dir", run]


@pytest.mark.parametrize("kind", REFUSED)
def test_unexportable_model_is_refused_early(
    kind: str, images: Path, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, why = REFUSED[kind]
    monkeypatch.setattr(quantizing, "calibrate", lambda *_: pytest.fail("it was calibrated"))
    result = saq("quantize", network(make), "--bits", 4, *options(images, tmp_path / "run"), "--quiet")

    assert result.exit_code == UnsupportedModel.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "saq/of_a_test cannot be exported to ONNX in style qdq: " in last_error(result)
    assert why in last_error(result)
    assert "use --no-export to write model.safetensors only, or another network" in last_error(result)
    assert not list(tmp_path.iterdir())


def test_every_requested_style_is_tried(images: Path, network: Any, tmp_path: Path) -> None:
    name, run = network(Largest), tmp_path / "run"
    styles = ("--style", "qonnx", "--style", "exact")
    result = saq("quantize", name, "--bits", 4, *options(images, run), *styles, "--quiet")

    assert result.exit_code == 1
    assert "in style exact: style exact has no form of operator topk" in last_error(result)
    assert last_error(result).endswith("only, or another --style")
    assert not run.exists()

    found = answer("quantize", name, "--bits", 4, *options(images, run), *styles[:2])
    assert found["onnx_style"] == "qonnx"


def test_trial_under_budget_uses_most_bits(images: Path, network: Any, tmp_path: Path) -> None:
    """8-bit codes of the paper's grid, which the search may choose, have no INT8 container."""
    bits = ("--bops", "w4a4", "--weight-grid", "paper", "--pin", "*=2-8")
    given = (*options(images, tmp_path / "run"), "--style", "trt", "--quiet")
    result = saq("quantize", network(Plain), *bits, *given)

    assert result.exit_code == 1
    assert "style trt has INT8 weights only, and the codes of stem reach 255" in last_error(result)
    assert not list(tmp_path.iterdir())
    assert saq("quantize", network(Plain), *bits, "--candidates", "2,4", *given).exit_code == 0


def test_no_export_writes_only_safetensors(images: Path, network: Any, tmp_path: Path) -> None:
    name, run = network(DecidesByValues), tmp_path / "run"
    found = answer("quantize", name, "--bits", 4, *options(images, run), "--no-export")

    assert {path.name for path in (run / "artifacts").iterdir()} == {"model.safetensors"}
    assert set(found["artifacts"]) == {"safetensors", "policy", "report", "page"}
    assert {found[key] for key in found if key.startswith("onnx_")} == {None}
    assert len([key for key in found if key.startswith("onnx_")]) == 10
    assert json.loads((run / "config.json").read_text())["export"] == {"styles": []}
    assert "No ONNX file was written (`export.styles=()`)." in (run / "report.md").read_text()
    assert answer("eval", run, "--data", images)["top1"] == found["top1"]

    again = answer("rerun", run)
    assert again["identical"]
    assert again["compared"] == ["policy", "metrics", "figures", "weights"]
    resumed = saq("quantize", "--run-dir", run, "--resume", "--quiet")
    assert resumed.exit_code == 0
    assert "no ONNX file was written (--no-export)" in resumed.stdout


def test_one_verified_file_per_style(images: Path, network: Any, tmp_path: Path) -> None:
    name, run = network(Plain), tmp_path / "run"
    styles = ("--style", "trt", "--style", "qdq")
    found = answer("quantize", name, "--bits", 4, *options(images, run), *styles)

    assert found["artifacts"]["trt"] == str(run / "artifacts" / "model.onnx")
    assert found["artifacts"]["qdq"] == str(run / "artifacts" / "model-qdq.onnx")
    assert found["onnx_style"] == "trt"
    for key, style in (("verdict", "trt"), ("verdict-qdq", "qdq")):
        assert json.loads(Path(found["artifacts"][key]).read_text())["style"] == style
    assert answer("rerun", run)["identical"]
    (run / "artifacts" / "model-qdq.onnx").write_bytes((run / "artifacts" / "model.onnx").read_bytes())
    result = saq("rerun", run, "--resume", "--run-dir", tmp_path / "run-rerun", "--quiet")
    assert result.exit_code == 3
    assert "artifacts/model-qdq.onnx was changed" in result.stdout


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--style", "tflite"), "there is no export style 'tflite': choose from qdq, "),
        (("--style", "qdq", "--style", "qdq"), "--style qdq is given twice"),
        (("--style", "qdq", "--no-export"), "--style qdq selects an ONNX style: remove it, or --no-export"),
        (("--verify-images", "none"), "--verify-images none: give a number of at least 1, or all"),
        (("--set", "data.verify_images=0"), "give a number of at least 1, or all"),
    ],
)
def test_meaningless_export_options_are_refused(given: tuple[str, ...], says: str, tmp_path: Path) -> None:
    result = saq("quantize", "saq/resnet20", "--bits", 4, *options(tmp_path, tmp_path / "run"), *given)

    assert result.exit_code == 1
    assert says in last_error(result)
    assert not list(tmp_path.iterdir())


def test_shared_weight_use_is_exported(images: Path, network: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = answer("quantize", network(OwnProduct), "--bits", 4, *options(images, run))
    verdict = json.loads((run / "artifacts" / "model.verdict.json").read_text())

    assert found["policy"]["inner"] == {"weight": 4, "activation": 4}
    assert [layer["layer"] for layer in verdict["per_layer"]] == ["stem", "inner", "head"]


def tried(make: Callable[[], nn.Module], network: Any, **settings: Any) -> None:
    given = {"model.name": network(make), "model.pretrained": False, "quantization.bits": "4", **settings}
    config = resolve(options=given)
    calibration.check_exports(config, wrap_and_trace(load_float(config.model, SILENT)))


def test_trial_keeps_random_state(network: Any) -> None:
    network(Plain)
    torch.manual_seed(5)
    tried(Plain, network)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    load_float(resolve(options={"model.name": "saq/of_a_test", "model.pretrained": False}).model, SILENT)

    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("raised", "says"),
    [(AssertionError("oh\nno"), "AssertionError: oh no"), (KeyError("x"), "KeyError: 'x'")],
)
def test_failing_exporter_is_named_early(
    raised: Exception, says: str, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(QdqExporter, "export", export)
    with pytest.raises(UnsupportedModel, match=says):
        tried(Plain, network, **{"quantization.quantizer": "lsq"})


def test_trial_is_skipped_on_full_disk(
    images: Path, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.tempfile, "TemporaryDirectory", full)
    result = saq("quantize", network(Plain), "--bits", 4, *options(images, tmp_path / "run"))

    assert result.exit_code == 0
    assert "no trial export before training: " in result.stderr
    assert (tmp_path / "run" / "artifacts" / "model.onnx").is_file()


def test_export_verifies_on_the_run_data(
    images: Path, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    prove = publish.prove_graph

    def note(path: Path, model: nn.Module, style: str, batches: Any, *rest: Any) -> Any:
        kept = list(batches)
        seen.append(torch.cat([batch for batch, _ in kept]))
        return prove(path, model, style, kept, *rest)

    monkeypatch.setattr(publish, "prove_graph", note)
    run, some = tmp_path / "run", ("--verify-images", 5)
    given = (*options(images, run), "--seed", 3, *some)
    found = answer("quantize", network(Plain), "--bits", 4, *given)
    again = answer("export", run, "--onnx", tmp_path / "again.onnx", "--data", images, *some)

    assert (found["onnx_images"], found["onnx_images_available"]) == (5, 4 * CLASSES)
    assert torch.equal(*seen)
    assert found["onnx_max_abs_diff"] == again["max_abs_diff"]
    assert (tmp_path / "again.onnx").read_bytes() == (run / "artifacts" / "model.onnx").read_bytes()
    assert "on 100.00 % of 5 images (of 12)" in (run / "report.md").read_text()
