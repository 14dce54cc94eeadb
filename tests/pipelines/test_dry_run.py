"""--dry-run refuses what a run would refuse, describes the run, and downloads and writes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saqcli.models import libraries
from tests.support.command_line import answer, last_error, saq

SIDE, CLASSES, TRAIN, VAL = 16, 3, 5, 2
SMALL = ("saq/resnet20", "--no-pretrained", "--num-classes", CLASSES, "--input-size", SIDE)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for label in range(CLASSES):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with weight downloads disabled."""

    monkeypatch.delenv("COLUMNS", raising=False)  # nothing wraps in a pipe

    def fetched(*_: object) -> None:
        raise AssertionError("a dry run fetches nothing")

    monkeypatch.setattr(libraries, "require_repository", fetched)
    monkeypatch.setattr(libraries, "require_url", fetched)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(*options: object, verb: str = "quantize") -> dict[str, str]:
    """The printed plan, by subject."""
    result = saq(verb, *options, "--dry-run", "--quiet")
    assert result.exit_code == 0, result.stderr
    found: dict[str, str] = {}
    subject = ""
    for line in result.stdout.splitlines()[2:]:
        subject = line[:11].strip() or subject
        found[subject] = f"{found[subject]} / {line[11:]}" if subject in found else line[11:]
    return found


def test_dry_run_describes_the_run(images: Path, working_directory: Path) -> None:
    found = lines(*SMALL, "--data", images, "--bits", 4, "--batch-size", 6, "--epochs", 2)
    costs = answer("profile", *SMALL, "--bits", 4)

    assert found["model"] == "saq/resnet20, 3 classes, input 3x16x16"
    assert found["weights"] == "random"
    assert found["data"].split(" / ") == [
        f"{images / 'train'}: 15 images in 3 classes: class0, class1, class2",
        f"{images / 'val'}: 6 images in 3 classes: class0, class1, class2",
    ]
    assert found["device"] == "cpu"
    assert found["bits"].startswith(f"--bits 4: {costs['bops'] / 1e6:.4g} MBOPs (")
    assert "pinned to 8 bits (input layers and classifiers): conv1, linear" in found["bits"]
    assert found["reachable"].startswith(f"{costs['floor_bops'] / 1e6:.4g} MBOPs to ")
    assert found["training"].startswith(
        "qat, 2 epochs of 2 steps with 6 images each; sgd, learning rate 0.005"
    )
    assert found["run"] == "runs/resnet20-w4a4, new"
    assert "artifacts/model.onnx" in found["writes"]
    assert "search" not in found
    assert list(working_directory.iterdir()) == []


def test_single_epoch_and_step_are_singular(images: Path) -> None:
    found = lines(*SMALL, "--data", images, "--bits", 4, "--epochs", 1)

    assert "1 epoch of 1 step with 15 images each" in found["training"]


def test_bits_line_includes_pins(images: Path) -> None:
    found = lines(*SMALL, "--data", images, "--bits", 4, "--pin", "layer1.*=8", "--pin", "linear=w8a4")

    assert found["bits"].startswith("--bits 4 --pin 'layer1.*=8' --pin linear=w8a4: ")


def test_budget_shows_uniform_bits_that_fit(images: Path) -> None:
    options = (*SMALL, "--data", images, "--bops", "w4a4", "--epochs", 0)
    found, plan = lines(*options), answer("quantize", *options, "--dry-run")

    assert "largest uniform bits that fit: w4a4, " in found["bits"]
    assert found["search"].startswith("swaps, 18 decisions, candidates 2, 3, 4, 5, 6, 8")
    assert found["training"] == "none: calibration only"
    assert plan["profile"]["bops"] == plan["budget_bops"]
    assert {layer["weight_bits"] for layer in plan["profile"]["layers"]} == {4, 8}


def test_search_uses_training_images(images: Path) -> None:
    options = ("--data", images, "--budget", "w3a3", "--searcher", "samq", "--batch-size", 4)
    found = lines(*SMALL, *options, verb="search")

    assert found["data"] == f"{images / 'train'}: 15 images in 3 classes: class0, class1, class2"
    assert found["search"].startswith("samq, 18 decisions")
    assert "training" not in found
    assert "search.json" in found["writes"]


def test_published_weights_are_not_downloaded() -> None:
    found = lines("resnet18", "--bits", 4)

    assert found["weights"].startswith("timm/resnet18.a1_in1k (published; ")
    assert found["data"] == "none"


def test_data_may_be_missing() -> None:
    result = saq("quantize", *SMALL, "--bits", 4, "--dry-run")

    assert result.exit_code == 0
    assert "requires --data DIR" in result.stdout


def test_json_keys_are_stable(images: Path) -> None:
    plan = answer("quantize", *SMALL, "--data", images, "--bits", 4, "--dry-run")

    assert {"run_dir", "config", "budget_bops", "budget_bytes", "profile"} <= set(plan)
    assert plan["run_dir"] == "runs/resnet20-w4a4"
    assert plan["data"]["train"] == {
        "name": str(images / "train"),
        "images": 15,
        "classes": ["class0", "class1", "class2"],
    }
    assert plan["config"]["model"]["num_classes"] == CLASSES


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("resnet18", "--bits", 4), 1, "3 classes"),
        (("saq/resnet20", "--num-classes", 3, "--bits", 4), 1, "no published weights"),
        ((*SMALL, "--bits", 4, "--device", "cuda:7"), 1, "cuda:7"),
        ((*SMALL, "--bops", "1M"), 4, "reachable"),
        ((*SMALL, "--bits", 4, "--distill"), 1, "--distill"),
        ((*SMALL, "--bits", 4, "--mixup", 0.2, "--batch-size", 5), 1, "multiple of 2"),
        ((*SMALL, "--bits", 4, "--run-dir", "taken"), 1, "taken"),
        ((*SMALL, "--bits", 4, "--run-dir", "file/run"), 1, "is a file"),
        ((*SMALL, "--policy", "none.json"), 1, "none.json"),
        ((*SMALL, "--bits", 4, "--bops", "w4a4"), 1, "--bops"),
    ],
)
def test_dry_run_refuses_like_a_run(
    images: Path, working_directory: Path, options: tuple[Any, ...], code: int, says: str
) -> None:
    (working_directory / "taken").mkdir()
    (working_directory / "taken" / "mine.txt").touch()
    (working_directory / "file").touch()

    result = saq("quantize", *options, "--data", images, "--dry-run", "--quiet")

    assert result.exit_code == code, result.stdout
    assert says in last_error(result)
    assert {path.name for path in working_directory.iterdir()} == {"taken", "file"}


def test_impossible_search_is_refused(images: Path) -> None:
    options = ("--data", images, "--budget", "w4a4", "--searcher", "samq", "--set", "search.images=1")
    result = saq("search", *SMALL, *options, "--dry-run", "--quiet")

    assert result.exit_code == 1
    assert "1 image, too few" in last_error(result)
