"""Class names of a file match its logits, and a run's labels are stored in all its files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from saqcli.export import EXPORTERS
from saqcli.export.restore import restore
from saqcli.machine import cores
from saqcli.models.load import ModelSpec, load_model
from saqcli.pipelines.predictors import open_onnx
from saqcli.runs.manifest import RunManifest
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options

TENCH, GOLF_BALL, PARACHUTE = "n01440764", "n03445777", "n03888257"  # 0, 574 and 701 of ImageNet-1k


@pytest.fixture(scope="module")
def imagenet_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a 1000-class network on three synset folders that predicts parachute for everything."""
    folder = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for synset in (TENCH, GOLF_BALL, PARACHUTE):
            (folder / "data" / split / synset).mkdir(parents=True)
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / split / synset / "0.png")
    loaded = load_model(ModelSpec("timm/test_resnet", pretrained=False, input_size=32))
    state = loaded.model.state_dict()
    state["fc.bias"][701] = 100.0
    save_file(state, folder / "w.safetensors")
    answer(
        *(
            "quantize",
            "timm/test_resnet",
            "--weights",
            folder / "w.safetensors",
            "--input-size",
            32,
            "--bits",
            8,
        ),
        *(
            "--data",
            folder / "data",
            "--epochs",
            0,
            "--batch-size",
            3,
            "--workers",
            0,
            "--run-dir",
            folder / "run",
        ),
    )
    return folder


class TestImageNetClasses:
    def test_class_name_of_best_logit_is_correct(self, imagenet_run: Path) -> None:
        path = imagenet_run / "run" / "artifacts" / "model.onnx"
        found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        names, facts = json.loads(found["class_names"]), json.loads(found["saq.facts"])
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"images": np.zeros((1, 3, 32, 32), np.float32)})
        assert len(names) == 1000
        assert names[logits[0].argmax()] == PARACHUTE
        assert facts["folders"] == {TENCH: 0, GOLF_BALL: 574, PARACHUTE: 701}
        assert facts["class_order"] == "imagenet"
        assert facts["class_names"] == names

    def test_top1_counts_the_right_class(self, imagenet_run: Path) -> None:
        for target in ("run", "run/artifacts/model.onnx", "run/artifacts/model.safetensors"):
            found = answer("eval", imagenet_run / target, "--data", imagenet_run / "data", "--workers", 0)
            assert found["top1"] == pytest.approx(100 / 3)

    def test_folders_may_be_words_or_mapped(self, imagenet_run: Path, tmp_path: Path) -> None:
        for synset, word in ((TENCH, "tench"), (PARACHUTE, "parachute")):
            shutil.copytree(imagenet_run / "data" / "val" / synset, tmp_path / "words" / word)
            shutil.copytree(imagenet_run / "data" / "val" / synset, tmp_path / "own" / f"my {word}")
        (tmp_path / "map.csv").write_text("my tench,0\nmy parachute,parachute\n")
        run, options = imagenet_run / "run", ("--workers", 0)
        assert answer("eval", run, "--data", tmp_path / "words", *options)["top1"] == 50
        mapped = ("--data", tmp_path / "own", "--class-map", tmp_path / "map.csv")
        assert answer("eval", run, *mapped, *options)["top1"] == 50
        refused = saq("eval", run, *mapped[:2], *options, "--quiet")
        assert refused.exit_code == 1
        assert "has the classes my parachute, my tench" in last_error(refused)
        assert "--class-map" in last_error(refused)

    def test_older_files_are_read(self, imagenet_run: Path, tmp_path: Path) -> None:
        model, facts = restore(imagenet_run / "run" / "artifacts" / "model.safetensors")
        folders = (TENCH, GOLF_BALL, PARACHUTE)
        before = facts.model_copy(update={"class_names": folders, "folders": {}, "class_order": ""})
        for style, name in (("safetensors", "old.safetensors"), ("qdq", "old.onnx")):
            EXPORTERS[style]().export(model, torch.zeros(2, 3, 32, 32), tmp_path / name, before)
        for found in (restore(tmp_path / "old.safetensors")[1], open_onnx(tmp_path / "old.onnx").metadata):
            assert found is not None
            assert (len(found.class_names), found.folders) == (1000, facts.folders)
        for name in ("old.safetensors", "old.onnx"):
            found_again = answer("eval", tmp_path / name, "--data", imagenet_run / "data", "--workers", 0)
            assert found_again["top1"] == pytest.approx(100 / 3)
        answer("export", tmp_path / "old.safetensors", "--onnx", tmp_path / "new.onnx")
        entries = {entry.key: entry.value for entry in onnx.load(tmp_path / "new.onnx").metadata_props}
        assert json.loads(entries["class_names"])[701] == PARACHUTE


Renamed = Callable[[list[str]], Path]


@pytest.fixture
def renamed(digits: Path, tmp_path: Path) -> Renamed:
    """Copies a few digits, with class folders renamed in the order of their labels."""

    def make(names: list[str]) -> Path:
        for split in ("train", "val"):
            for label, name in enumerate(names):
                (tmp_path / "data" / split).mkdir(parents=True, exist_ok=True)
                shutil.copytree(digits / "few" / split / str(label), tmp_path / "data" / split / name)
        return tmp_path / "data"

    return make


NATURAL = [f"class_{number}" for number in range(1, 11)]
MIXED = ["Eight", "Five", "four", "Nine", "one", "Seven", "six", "Three", "two", "Zero"]


@pytest.mark.parametrize(
    ("names", "order", "other"),
    [
        (NATURAL, [], ["--class-order", "torchvision"]),
        (sorted(NATURAL), ["--class-order", "torchvision"], []),
        (MIXED, [], ["--class-order", "torchvision"]),
        (sorted(MIXED), ["--class-order", "torchvision"], ["--class-order", "timm"]),
        (
            [str(number) for number in range(1, 11)],
            ["--class-order", "timm"],
            ["--class-order", "torchvision"],
        ),
    ],
)
def test_accuracy_requires_the_training_order(
    names: list[str], order: list[str], other: list[str], digits: Path, renamed: Renamed
) -> None:
    def top1(data: Path, *options: str) -> float:
        return float(answer("eval", MODEL, *float_options(digits, data), *options)["top1"])

    data, right = renamed(names), top1(digits / "few")
    assert right > 80
    assert top1(data, *order) == right
    assert top1(data, *other) < right - 50
    said = saq("eval", MODEL, *float_options(digits, data), *order).stderr
    assert "timm's order" in said
    assert "torchvision's order" in said
    assert f"--class-order {'timm' if order[-1:] == ['torchvision'] else 'torchvision'}" in said


def quantized(digits: Path, data: Path, run: Path, *options: object) -> Any:
    more = ("--bits", 8, "--epochs", 0, "--batch-size", 32, "--run-dir", run)
    return answer("quantize", MODEL, *float_options(digits, data), *more, *options)


def test_class_order_is_stored_in_all_files(digits: Path, renamed: Renamed, tmp_path: Path) -> None:
    data, run = renamed(sorted(NATURAL)), tmp_path / "run"
    done = quantized(digits, data, run, "--class-order", "torchvision")
    assert done["float_top1"] > 80
    targets = [run, run / "artifacts" / "model.onnx", run / "artifacts" / "model.safetensors"]
    assert {answer("eval", target, "--data", data)["top1"] for target in targets} == {done["top1"]}
    assert answer("eval", run, "--data", data)["class_order"] == "torchvision"
    exported = saq("export", run, "--onnx", tmp_path / "m.onnx", "--data", data)
    assert exported.exit_code == 0
    assert "in torchvision's order" in exported.stderr
    assert open_onnx(tmp_path / "m.onnx").classes.names == tuple(sorted(NATURAL))

    manifest = RunManifest.model_validate_json((run / "manifest.json").read_text())
    assert manifest.class_order == "torchvision"
    assert json.loads((run / "config.json").read_text())["data"]["class_order"] == "torchvision"

    against = saq("eval", run, "--data", data, "--class-order", "timm")
    assert (
        f"{run / 'artifacts' / 'model.safetensors'} numbers these classes differently: class_10 is 1"
        in against.stderr
    )
    assert answer("eval", run, "--data", data, "--class-order", "timm")["top1"] < done["top1"] - 50


def test_run_keeps_class_map_and_exif_setting(digits: Path, renamed: Renamed, tmp_path: Path) -> None:
    words = ["null", "eins", "zwei", "drei", "vier", "fuenf", "sechs", "sieben", "acht", "neun"]
    data, run = renamed(words), tmp_path / "run"
    turned = Image.Exif()
    turned[0x0112] = 3
    for path in data.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path))[::-1, ::-1].copy()).save(path, exif=turned)
    (tmp_path / "map.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    done = quantized(digits, data, run, "--class-map", tmp_path / "map.json", "--exif-transpose")
    assert done["float_top1"] > 80

    manifest, resume = run / "manifest.json", ("quantize", "--run-dir", run, "--resume", "--quiet")
    manifest.write_text(manifest.read_text().replace('"finished"', '"interrupted"'))
    (tmp_path / "map.json").write_text(json.dumps({word: index for index, word in enumerate(words[::-1])}))
    refused = saq(*resume)
    assert refused.exit_code == 1
    assert "with other names or labels" in last_error(refused)
    (tmp_path / "map.json").unlink()  # the run stores its labels
    assert saq(*resume).exit_code == 0

    for target in (run, run / "artifacts" / "model.onnx"):
        assert answer("eval", target, "--data", data)["top1"] == done["top1"]
        assert answer("eval", target, "--data", data, "--no-exif-transpose")["top1"] < done["top1"] - 20
    said = saq("eval", run, "--data", data, "--no-exif-transpose").stderr
    assert "the model was trained with --exif-transpose" in said


def test_excess_workers_are_noted_once(digits: Path) -> None:
    options = ["eval", MODEL, *float_options(digits, digits / "few")]
    done = saq(*options, "--workers", cores() + 1)
    assert done.exit_code == 0
    assert done.stderr.count("worker") == 1
    assert f"--workers {cores() + 1} exceeds the {cores()} cores" in done.stderr
