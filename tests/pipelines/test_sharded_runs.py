"""Commands on sharded data (wds/): the same figures as on the folder the shards were made from."""

import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("webdataset")

from saqcli.data import archives as shards_module
from saqcli.training import trainer
from tests.support.command_line import answer, last_error, last_line, saq
from tests.support.digits import MODEL, float_options
from tests.support.shards import shards_of_folder

FEW = {"train": 8, "val": 4}  # images a class


@pytest.fixture(scope="module")
def few(digits: Path, folder: Path) -> Path:
    """Some of the digits, as a folder and as shards."""
    for split, count in FEW.items():
        for label in range(10):
            kept = folder / "images" / split / str(label)
            kept.mkdir(parents=True)
            for file in sorted((digits / "images" / split / str(label)).iterdir())[:count]:
                (kept / file.name).write_bytes(file.read_bytes())
    shards_of_folder(folder / "images", folder / "shards", (13, 7, 22))
    return folder


def options(digits: Path, few: Path, workers: int) -> list[object]:
    return [MODEL, *float_options(digits, f"wds/{few / 'shards'}"), "--workers", workers]  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_equals_the_image_folder(digits: Path, few: Path, workers: int) -> None:
    expected = answer("eval", MODEL, *float_options(digits, few / "images"), "--batch-size", 7)
    found = answer("eval", *options(digits, few, workers), "--batch-size", 7)
    assert found["images"] == expected["images"] == 40
    assert (found["top1"], found["top5"]) == (expected["top1"], expected["top5"])
    assert found["loss"] == pytest.approx(expected["loss"])


@pytest.mark.slow  # exports two models
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_within_an_epoch_is_byte_identical(
    digits: Path, few: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "SHUFFLE_BUFFER", 16)
    command = [
        "quantize",
        *options(digits, few, workers),
        "--bits",
        "w4a4",
        "--epochs",
        2,
        "--batch-size",
        24,
    ]
    command += ["--set", "data.verify_images=8", "--set", "data.augmentation=cifar", "--quiet"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    result = answer(*command, "--run-dir", whole)
    assert result["images"] == 40
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_minimizer", raising_in_step(5))  # of 3 in each epoch
        stopped = saq(*command, "--run-dir", run)
    assert stopped.exit_code == 143
    assert last_line(stopped).startswith("Interrupted; progress saved. Resume with `saq ")
    answer("quantize", "--run-dir", run, "--resume")
    same = [(path / "artifacts" / "model.safetensors").read_bytes() for path in (whole, run)]
    assert same[0] == same[1]


def raising_in_step(number: int) -> Any:
    """Build a minimizer that raises SIGTERM in the step of that number."""
    make = trainer.make_minimizer

    def made(*arguments: Any) -> Any:
        minimizer = make(*arguments)
        take, calls = minimizer.step, iter(range(1, 1000))

        def counted(*given: Any, **named: Any) -> Any:
            if next(calls) == number:
                signal.raise_signal(signal.SIGTERM)
            return take(*given, **named)

        minimizer.step = counted
        return minimizer

    return made


@pytest.mark.slow
def test_search_runs_on_shards(digits: Path, few: Path, tmp_path: Path) -> None:
    found = answer(
        *("search", *options(digits, few, 0), "--budget", "w4a4", "--run-dir", tmp_path, "--batch-size", 16),
        *("--searcher", "sensitivity", "--set", "search.images=60", "--set", "search.scoring_images=16"),
    )
    assert found["bops"] <= found["budget_bops"]


def test_broken_shards_are_one_line_errors(digits: Path, few: Path, tmp_path: Path) -> None:
    shards_of_folder(few / "images", tmp_path / "shards", (13, 7, 22))
    damaged = tmp_path / "shards" / "validation-0001.tar"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    for workers in (0, 2):
        result = saq("eval", *options(digits, tmp_path, workers), "--json")
        assert result.exit_code == 1
        assert "validation-0001.tar" in last_error(result)
        assert len(result.stderr.strip().splitlines()) == 1
