"""Fine-tuning that ends below its best: the best state is kept, reported, and exported on request."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from saqcli.cli.screens.tables import show_quantized
from saqcli.config import TrainingSection
from saqcli.export.restore import restore
from saqcli.pipelines import analysis_inputs, stages
from saqcli.pipelines import quantize as quantizing
from saqcli.progress import SILENT
from saqcli.runs.checkpoints import CheckpointFile
from saqcli.runs.directory import RunDirectory
from saqcli.tasks.classification import Score, noise
from saqcli.training.best import Best, advice
from saqcli.training.trainer import Trainer
from tests.support.command_line import answer, saq
from tests.support.digits import MODEL, float_options

EPOCHS = 2


@pytest.fixture(scope="module")
def images(digits: Path) -> Path:
    return digits / "few"


@pytest.fixture(scope="module")
def degraded_run(digits: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run with a far too high learning rate, and its output."""
    run = tmp_path_factory.mktemp("degraded") / "run"
    given = ("--bits", 4, "--epochs", EPOCHS, "--lr", 0.5, "--ema", 0.5, "--batch-size", 48, "--workers", 0)
    options = (*float_options(digits, images), *given, "--no-export")
    return run, answer("quantize", MODEL, *options, "--run-dir", run)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def top1(images: Path, target: Path) -> float:
    return float(answer("eval", target, "--data", images)["top1"])


def test_best_state_matches_the_metrics(degraded_run: tuple[Path, Any], images: Path) -> None:
    run, found = degraded_run
    scores = {line.get("epoch", 0): line for line in lines(run) if line["phase"] in ("calibrated", "val")}
    best = max(scores, key=lambda epoch: (scores[epoch]["top1"], -scores[epoch]["loss"], epoch))

    assert sorted(scores) == [0, 1, EPOCHS]
    assert best < EPOCHS
    assert (found["best_epoch"], found["best_top1"]) == (best, scores[best]["top1"])
    assert found["top1"] == found["last_top1"] == scores[EPOCHS]["top1"] < found["best_top1"] - 20
    assert found["exported_epoch"] == found["epochs"] == EPOCHS
    assert lines(run)[-1]["best_epoch"] == best
    assert top1(images, run) == found["top1"]
    assert top1(images, run / "checkpoints" / "best.safetensors") == found["best_top1"]
    assert found["artifacts"]["best"] == str(run / "checkpoints" / "best.safetensors")


def test_table_and_report_show_last_and_best(
    degraded_run: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run, found = degraded_run
    show_quantized(found)
    table, report = capsys.readouterr().out, (run / "report.md").read_text()
    best = f"best (epoch {found['best_epoch']})"

    for text in (table, report):
        for part in ("calibrated", f"last (epoch {EPOCHS})", best, f"{found['best_top1']:.2f} %"):
            assert part in text
    assert found["advice"] in " ".join(table.split())  # wrapped on a terminal
    for part in ("ended below calibration", "a lower --lr than 0.5", "--epochs 0", "training.keep=best"):
        assert part in found["advice"]
    for part in ("ended below calibration", "a lower `training.lr` than 0.5", "`training.keep=best`"):
        assert part in report
    row = next(line for line in report.splitlines() if line.startswith("| top-1"))
    shown = [found[f"{name}_top1"] for name in ("float", "calibrated", "last", "best")]
    assert row == f"| top-1 | {' | '.join(f'{value:.2f} %' for value in shown)} |"


def test_resume_can_export_the_best(degraded_run: tuple[Path, Any], images: Path, tmp_path: Path) -> None:
    before, found = degraded_run
    run = shutil.copytree(before, tmp_path / "run")

    again = answer("quantize", "--run-dir", run, "--resume", "--set", "training.keep=best")

    assert again["top1"] == again["best_top1"] == found["best_top1"]
    assert (again["last_top1"], again["exported_epoch"]) == (found["last_top1"], found["best_epoch"])
    assert top1(images, run) == found["best_top1"]
    assert not (run / "checkpoints" / "best.safetensors").exists()
    assert RunDirectory.open(run).config().training.keep == "best"
    kept, exported = (restore(path)[0].state_dict() for path in (
        before / "checkpoints" / "best.safetensors", run / "artifacts" / "model.safetensors"
    ))  # fmt: skip
    assert all(torch.equal(kept[name], exported[name]) for name in exported)
    for directory in (before, run):  # both states have their latent weights
        opened = RunDirectory.open(directory)
        model, facts = restore(opened.safetensors_path)
        assert analysis_inputs._with_latent_weights(model, facts, opened, SILENT, None) is not None
    refused = saq("quantize", "--run-dir", run, "--resume", "--lr", 0.1)
    assert "started with other settings (training.lr: 0.5 -> 0.1)" in refused.stderr


def test_checkpoints_without_best_state_resume(degraded_run: tuple[Path, Any], tmp_path: Path) -> None:
    """Checkpoints of earlier versions: the best epoch is unknown, and the model is the same."""
    before, found = degraded_run
    run = shutil.copytree(before, tmp_path / "run")
    file = CheckpointFile(run / "checkpoints" / "last.ckpt")
    state = file.load() or {}
    for name in ("best", "validated"):
        del state[name]
    file.save(state)

    again = answer("quantize", "--run-dir", run, "--resume", "--set", "training.keep=best")

    assert (again["top1"], again["last_top1"]) == (found["top1"], found["top1"])
    assert (again["best_epoch"], again["best_top1"]) == (None, None)
    assert not (run / "checkpoints" / "best.safetensors").exists()
    show_quantized(again)


def test_calibration_is_exported_without_training(digits: Path, images: Path, tmp_path: Path) -> None:
    options = (*float_options(digits, images), "--bits", 8, "--epochs", 0, "--no-export")

    found = answer("quantize", MODEL, *options, "--run-dir", tmp_path)

    assert found["top1"] == found["best_top1"] == found["calibrated_top1"]
    assert (found["best_epoch"], found["exported_epoch"], found["last_top1"]) == (0, 0, None)
    assert "|  | float | calibrated |\n" in (tmp_path / "report.md").read_text()


def test_training_is_freed_before_final_evaluation(
    digits: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    score = stages.score

    class Watched(Trainer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            parts = (self, self.optimizer, self.minimizer, self.average, self.validation, options["teacher"])
            made.extend(map(weakref.ref, parts))

    def watched_score(*arguments: Any, **options: Any) -> Score:
        alive.append(sum(reference() is not None for reference in made))
        return score(*arguments, **options)

    monkeypatch.setattr(quantizing, "Trainer", Watched)
    monkeypatch.setattr(stages, "score", watched_score)
    options = ("--bits", 4, "--epochs", 1, "--ema", 0.5, "--distill", "--workers", 0, "--no-export")

    answer("quantize", MODEL, *float_options(digits, images), *options, "--run-dir", tmp_path)

    assert len(made) == 6
    assert alive == [0, 0, 0]


def test_noise_is_a_standard_error() -> None:
    one, other = Score(images=10_000, top1=88.2), Score(images=10_000, top1=87.2)
    assert noise(one, other) == pytest.approx(0.4644, abs=1e-4)
    assert noise(Score(images=100, top1=100.0), Score(images=100, top1=100.0)) == 0


@pytest.mark.parametrize(
    ("images", "calibrated", "best", "last", "says"),
    [
        (8000, 88.2, (0, 88.2), 87.2, "ended below calibration (top-1 87.20 % after epoch 3, 88.20 % calibrated)"),
        (500, 88.2, (0, 88.2), 87.2, None),  # noise: 2.1
        (8000, 85.0, (1, 89.0), 87.2, "epoch 1 was better than the last one (top-1 89.00 %, then 87.20 %)"),
        (8000, 85.0, (1, 87.3), 87.2, None),
        (8000, 85.0, (3, 87.2), 87.2, None),
        (8000, 85.0, None, 80.0, "ended below calibration"),
    ],
)  # fmt: skip
def test_advice_appears_beyond_noise(
    images: int, calibrated: float, best: tuple[int, float] | None, last: float, says: str | None
) -> None:
    def score(value: float) -> Score:
        return Score(images=images, top1=value, loss=1.0)

    kept = Best(best[0], score(best[1]), {}) if best else None
    text = advice(score(calibrated), score(last), kept, TrainingSection(epochs=3, lr=0.02))

    assert (text is None) == (says is None)
    if text is not None and says is not None:
        assert says in text
        assert "a lower `training.lr` than 0.02" in text
        assert ("training.keep=best" in text) == (best is not None)


def test_ties_are_broken_by_loss_then_epoch() -> None:
    best = Best(1, Score(images=10, top1=90.0, loss=0.5), {})
    assert best.beaten_by(Score(images=10, top1=90.0, loss=0.4))
    assert best.beaten_by(Score(images=10, top1=90.0, loss=0.5))
    assert not best.beaten_by(Score(images=10, top1=90.0, loss=0.6))
    assert not best.beaten_by(Score(images=10, top1=89.0, loss=0.1))
    assert not best.beaten_by(Score(images=10, top1=90.0, loss=float("nan")))
