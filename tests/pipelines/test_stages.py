"""The ladder of ``saq quantize``, without labels: stages, agreement with the float network, stopping and resuming."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from saqcli.config import ReconstructionSection, resolve
from saqcli.reconstruction import block
from saqcli.reconstruction import reconstruct as loop
from saqcli.reconstruction.options import Reconstruction
from saqcli.runs.saving import SearchMemory
from tests.support.command_line import answer, last_error, last_line, saq
from tests.support.image_folders import noise

NET = (
    *("saq/resnet8s", "--no-pretrained", "--num-classes", 3, "--input-size", 32, "--mean", "0.5,0.5,0.5"),
    *("--std", "0.25,0.25,0.25", "--workers", 0),
)
STAGES = ("--recipe", "minutes", "--compensate", "--iterations", 2, "--bits", 3, "--no-export")
LADDER = ["calibrated", "compensated", "reconstructed"]


@pytest.fixture(scope="module", autouse=True)
def unfused() -> Iterator[None]:
    """Few iterations do not repay the seconds in which fused kernels are built."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (block, loop):
            patch.setattr(module, "fused_on_cpu", nullcontext)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(12):
        noise(index, 16).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders for validation alone."""
    folder = tmp_path_factory.mktemp("labelled")
    for index in range(9):
        (folder / "val" / "abc"[index % 3]).mkdir(parents=True, exist_ok=True)
        noise(100 + index, 16).save(folder / "val" / "abc"[index % 3] / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    answer("quantize", *NET, *STAGES, "--calibration", photos, "--run-dir", folder)
    return folder


def results(run: Path) -> Any:
    return json.loads((run / "manifest.json").read_text())["results"]


def metrics(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_same(run: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", "policy.json", "artifacts/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert results(run)["agreement"] == results(whole)["agreement"]
    assert not (run / "checkpoints" / "reconstruction.ckpt").exists()


def test_settings_mirror_those_of_the_library() -> None:
    section = ReconstructionSection().model_dump()

    assert section.pop("enabled") is False
    assert section == vars(Reconstruction())


def test_every_stage_has_a_row(run: Path) -> None:
    found = results(run)

    assert [row["stage"] for row in found["stages"]] == LADDER
    for row in found["stages"]:
        assert 0 <= row["agreement"] <= 100
        assert row["seconds"] >= 0
        assert row["top1"] is row["top5"] is row["loss"] is None
    assert found["agreement"] == found["stages"][-1]["agreement"]
    assert found["top1"] is found["float_top1"] is found["calibrated_top1"] is None
    assert (found["images"], found["scored_on"], found["epochs"]) == (12, "calibration", 0)


def test_metrics_tell_the_error_of_every_block(run: Path) -> None:
    lines = {line["phase"]: line for line in metrics(run)}

    assert list(lines) == ["float", *LADDER, "quantized"]
    assert lines["compensated"]["after"] <= lines["compensated"]["before"]
    assert (
        lines["reconstructed"]["blocks"][0]["before"] < 0.01
    )  # at 8 bits: the float network is the same one
    assert all(each["after"] <= each["before"] for each in lines["reconstructed"]["blocks"])


def test_report_says_that_there_were_no_labels(run: Path) -> None:
    text = (run / "report.md").read_text()

    assert "| agrees with float |" in text
    assert "on 12 images, the same as for calibration" in text
    assert "There were no labels" in text
    assert "top-1" not in text
    assert "| reconstructed |" in text


def test_rerun_repeats_all_stages(run: Path, tmp_path: Path) -> None:
    again = answer("rerun", run, "--run-dir", tmp_path / "again")

    assert again["identical"]
    check_same(tmp_path / "again", run)


def stop_at(patch: pytest.MonkeyPatch, offer: int) -> None:
    """Send Ctrl-C at that offer of a state in the reconstruction."""
    whole, seen = SearchMemory.offer, list[int]()

    def interrupted(self: SearchMemory, state: Callable[[], dict[str, Any]], **how: bool) -> None:
        seen.append(1)
        if len(seen) == offer:
            os.kill(os.getpid(), signal.SIGINT)
        whole(self, state, **how)

    patch.setattr(SearchMemory, "offer", interrupted)


@pytest.mark.parametrize("offer", [1, 5])
def test_stopped_reconstruction_resumes_to_the_same_bits(
    offer: int, run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_at(patch, offer)
        result = saq("quantize", *NET, *STAGES, "--calibration", photos, "--run-dir", stopped, "--quiet")
    assert result.exit_code == 130
    assert f"or export the model as it is with `saq export {stopped} --onnx model.onnx`" in last_line(result)

    if offer == 1:
        exported = answer("export", stopped, "--onnx", tmp_path / "model.onnx")
        assert exported["argmax_agreement"] == 1
    answer("quantize", "--run-dir", stopped, "--resume")
    check_same(stopped, run)


def test_other_images_do_not_resume(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, stopped = tmp_path / "images", tmp_path / "stopped"
    shutil.copytree(photos, images)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        saq("quantize", *NET, *STAGES, "--calibration", images, "--run-dir", stopped, "--quiet")
    (images / "3.png").unlink()
    result = saq("quantize", "--run-dir", stopped, "--resume", "--quiet")

    assert "the calibration images in" in last_error(result)
    assert "12 expected, 11 found" in last_error(result)


def test_zero_iterations_leave_the_calibrated_network(run: Path, photos: Path, tmp_path: Path) -> None:
    plain, zero = tmp_path / "plain", tmp_path / "zero"
    given = ("--bits", 3, "--no-export", "--calibration", photos)
    answer("quantize", *NET, *given, "--run-dir", plain)
    torch.manual_seed(0)  # the same random weights
    answer("quantize", *NET, *given, "--recipe", "minutes", "--iterations", 0, "--run-dir", zero)

    name = "artifacts/model.safetensors"
    assert (plain / name).read_bytes() == (zero / name).read_bytes()
    assert (plain / name).read_bytes() != (run / name).read_bytes()


def test_accuracy_comes_from_labelled_images(photos: Path, labelled: Path, tmp_path: Path) -> None:
    given = ("--bits", 3, "--no-export", "--epochs", 0, "--calibration", photos, "--data", labelled)
    found = answer("quantize", *NET, *given, "--run-dir", tmp_path / "run")

    assert (found["scored_on"], found["images"]) == ("validation", 9)
    assert found["top1"] == found["stages"][0]["top1"] is not None
    assert found["agreement"] is not None
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert sorted(manifest["images"]) == ["calibration", "val"]


def test_images_are_held_out_if_there_are_enough(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(64):
        noise(index, 16).save(images / f"{index}.png")
    plan = answer("quantize", *NET, "--bits", 3, "--no-export", "--calibration", images, "--dry-run")
    printed = saq("quantize", *NET, *STAGES, "--calibration", images, "--dry-run", "--quiet").stdout

    assert (plan["scored_on"], plan["scored_images"], plan["stages"]) == ("held out", 16, ["calibrated"])
    assert "no labels: compared with the float network on 16 images held out" in printed
    assert "calibrated, compensated, reconstructed" in printed
    assert "Missing" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", 4, "--epochs", 2), "--epochs 2 needs labels, and --calibration has none: use --epochs 0"),
        (("--bits", 4, "--recipe", "cifar"), "--epochs 60 needs labels"),
        (("--bops", "w4a4", "--searcher", "hawq"), "--searcher hawq searches on labelled images"),
        (("--bops", "w4a4", "--searcher", "hawq"), "fisher, swaps, error or uniform"),
        (("--bits", 4, "--data", "LABELLED", "--epochs", 1), "has no train/ folder|no train/"),
        (("--bits", 4, "--iterations", 9), "--iterations 9 has no effect without --reconstruct"),
    ],
)
def test_what_needs_labels_is_refused(
    options: tuple[object, ...], message: str, photos: Path, labelled: Path, tmp_path: Path
) -> None:
    options = tuple(labelled if each == "LABELLED" else each for each in options)
    result = saq("quantize", *NET, *options, "--calibration", photos, "--run-dir", tmp_path / "run")

    assert result.exit_code == 1
    assert any(part in last_error(result) for part in message.split("|"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("searcher", ["fisher", "swaps"])
def test_search_compares_with_float_without_labels(searcher: str, photos: Path, tmp_path: Path) -> None:
    options = (
        *NET,
        "--bops",
        "w4a4",
        "--candidates",
        "2,4,6",
        "--searcher",
        searcher,
        "--calibration",
        photos,
    )
    found = answer("search", *options, "--run-dir", tmp_path / "search")
    run = answer("quantize", *options, "--no-export", "--run-dir", tmp_path / "run")

    assert len({bits["weight"] for bits in found["policy"].values()}) > 1
    assert found["scoring_top1"] is found["scoring_loss"] is None
    assert (found["scoring_divergence"] is not None) == (searcher == "swaps")
    assert run["bops"] <= run["budget_bops"]
    assert "NaN" not in (tmp_path / "search" / "search.json").read_text()


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_missing_images_are_named(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = saq(
        "quantize", *NET, "--bits", 4, "--calibration", tmp_path / path, "--run-dir", tmp_path / "run"
    )

    assert result.exit_code == 1
    assert str(tmp_path / path) in last_error(result)
    assert not (tmp_path / "run").exists()


def test_one_image_suffices(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    noise(0, 16).save(images / "only.png")
    found = answer(
        "quantize", *NET, "--bits", 4, "--no-export", "--calibration", images, "--run-dir", tmp_path / "run"
    )

    assert (found["images"], found["scored_on"]) == (1, "calibration")


def test_epochs_default_to_none_without_labels() -> None:
    named = {"model.name": "resnet18", "data.calibration": "photos"}

    assert resolve(options=named).training.epochs == 0
    assert resolve(options={**named, "data.path": "imagenet"}).training.epochs == 3
    assert resolve(options={**named, "training.epochs": 2}).training.epochs == 2
    assert resolve(recipe="quick", options=named).training.epochs == 3


def test_unused_settings_are_not_written() -> None:
    config = resolve(options={"model.name": "resnet18", "quantization.bits": "4"})

    assert '"calibration"' not in config.to_json()
    assert '"reconstruction"' not in config.to_json()
    assert '"compensate"' not in config.to_json()
    named = resolve(recipe="minutes", options={"model.name": "resnet18"})
    assert json.loads(named.to_json())["reconstruction"]["enabled"]
