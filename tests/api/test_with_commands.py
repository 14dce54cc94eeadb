"""Python and the command line agree: runs are loaded, folders are read, the same model gets the same numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import saqcli as saq
from saqcli.errors import ConfigError, UnknownModel
from tests.support.command_line import answer
from tests.support.image_folders import noise

NETWORK = ("saq/resnet8s", "--no-pretrained", "--num-classes", 4)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noise, four classes."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("val", 4)):
        for number, name in enumerate("abcd"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                noise(1000 * number + index).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``saq quantize``."""
    path = tmp_path_factory.mktemp("runs") / "r"
    options = ("--data", images, "--workers", 0, "--epochs", 0, "--bits", 4, "--run-dir", path)
    answer("quantize", *NETWORK, *options)
    return path


def test_run_loads_with_all_that_is_known(run: Path, images: Path) -> None:
    model = saq.load(run)
    about = saq.info(model)

    assert about.class_names == tuple("abcd")
    assert about.preprocessing is not None
    assert about.preprocessing.input_size == (3, 32, 32)
    assert saq.bops(model) == answer("profile", run)["bops"]
    assert saq.profile(model).to_dict() == answer("profile", run) | {"model": "saq/resnet8s"}


def test_scores_agree_with_the_command(run: Path, images: Path) -> None:
    loader = saq.load_images(saq.load(run), images, workers=0)
    by_path, by_module = saq.evaluate(str(run), loader), saq.evaluate(saq.load(run), loader)
    expected = answer("eval", run, "--data", images, "--workers", 0)

    assert by_path == by_module
    assert (by_path.top1, by_path.images) == (expected["top1"], expected["images"])
    assert by_path.loss == pytest.approx(expected["loss"], rel=1e-6)


def test_exported_file_agrees_with_the_command(run: Path, images: Path, tmp_path: Path) -> None:
    loader = saq.load_images(saq.load(run), images, workers=0)
    verdict = saq.export_onnx(run, tmp_path / "python.onnx", verify=loader)
    answer("export", run, "--onnx", tmp_path / "command.onnx", "--data", images, "--workers", 0)

    assert verdict.images == 16
    assert (tmp_path / "python.onnx").read_bytes() == (tmp_path / "command.onnx").read_bytes()
    assert answer("eval", tmp_path / "python.onnx", "--data", images, "--workers", 0)["images"] == 16


def test_saved_module_works_on_the_command_line(images: Path, tmp_path: Path) -> None:
    net = saq.load_model("saq/resnet8s", pretrained=False, num_classes=4)
    q = saq.quantize_model(net, 4, calibration=saq.load_images(net, images, "train", workers=0))
    saq.save(q, tmp_path / "net.safetensors")

    found = answer("eval", tmp_path / "net.safetensors", "--data", images, "--workers", 0)
    assert found["top1"] == saq.evaluate(q, saq.load_images(q, images, workers=0)).top1
    assert answer("profile", tmp_path / "net.safetensors")["bops"] == saq.bops(q)
    exported = answer("export", tmp_path / "net.safetensors", "--onnx", tmp_path / "net.onnx")
    assert exported["verified"]


def test_names_are_models_too() -> None:
    with pytest.raises(UnknownModel, match="resnet"):
        saq.load_model("resnet8x")
    assert "saq/resnet8s" in saq.summary(saq.load_model("saq/resnet8s", pretrained=False, num_classes=4), 4)


def test_images_need_a_known_preprocessing(images: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocessing of .* is unknown"):
        saq.load_images(torch.nn.Linear(2, 2), images)


def test_progress_reports_the_long_steps() -> None:
    titles = []

    class Recorder:
        @contextmanager
        def task(self, title: str, total: int) -> Iterator[Any]:
            titles.append(title)
            yield self

        def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
            pass

        def note(self, text: str) -> None:
            titles.append(text)

    net = saq.load_model("saq/resnet8s", pretrained=False, num_classes=4, progress=Recorder())
    batch = (torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    q = saq.quantize_model(net, 4, calibration=[batch], progress=Recorder())
    saq.evaluate(q, [batch], progress=Recorder())
    saq.finetune(q, [batch], epochs=1, progress=Recorder())

    assert {"calibrating", "correcting means", "evaluating"} <= set(titles)
    assert any(title.startswith("epoch 1") for title in titles)
