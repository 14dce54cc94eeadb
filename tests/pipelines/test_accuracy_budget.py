"""Accuracy as a budget of ``saq search`` and ``saq quantize``, on handwritten digits."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import answer, last_error, last_line, saq
from tests.support.digits import MODEL, float_options
from tests.support.processes import figures, stop_at

SMALL = ("--batch-size", 32, "--workers", 0, "--scoring-images", 64, "--candidates", "2,4,8")
CALIBRATION = ("--set", "data.calibration_images=64")
QUICK = (
    *CALIBRATION,
    "--batch-size",
    32,
    "--workers",
    0,
    "--set",
    "search.scoring_images=64",
    "--candidates",
    "2,4,8",
    "--no-export",
)


@pytest.fixture(scope="module")
def network(digits: Path) -> list[object]:
    return [MODEL, *float_options(digits, digits / "few")]


def search(network: list[object], run: Path, *options: object) -> dict[str, Any]:
    return answer("search", *network, *SMALL, *CALIBRATION, *options, "--run-dir", run)


def test_search_meets_a_drop_with_fewer_bits(network: list[object], tmp_path: Path) -> None:
    found = search(network, tmp_path / "run", "--max-drop", 8)

    accuracy = found["accuracy"]
    assert accuracy["met"]
    assert accuracy["held_out_drop"] <= accuracy["allowed_drop"] == accuracy["max_drop"] == 8
    assert accuracy["held_out_drop"] == accuracy["held_out_float_top1"] - accuracy["held_out_top1"]
    assert accuracy["needed_cost"] == found["bops"]
    assert found["budget_bops"] is None
    assert found["scored"] == accuracy["measured"]
    kept = json.loads((tmp_path / "run" / "search.json").read_text())
    good = [
        one["bops"] for one in kept["configurations"] if one["top1"] >= accuracy["held_out_float_top1"] - 8
    ]
    assert found["bops"] == min(good)
    assert found["scoring_top1"] == accuracy["held_out_top1"]
    assert not (tmp_path / "run" / "checkpoints" / "accuracy.ckpt").exists()

    loose = search(network, tmp_path / "loose", "--max-drop", 99)
    assert loose["bops"] < found["bops"]  # the fewest bits


def test_unreachable_accuracy_is_kept_with_exit_code(network: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = saq(
        *("search", *network, *SMALL, *CALIBRATION, "--pin", "*=2", "--max-drop", 0.5),
        *("--run-dir", run),
    )
    assert result.exit_code == 4
    assert "no configuration meets the bound of accuracy" in last_error(result)
    assert (run / "policy.json").is_file()
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
    assert "drop of top-1: asked at most 0.50 points, held-out " in result.stdout


def test_tight_budget_says_what_accuracy_needs(network: list[object], tmp_path: Path) -> None:
    options = (*("search", *network, *SMALL, *CALIBRATION, "--budget", "w2a2"), "--max-drop", 8)
    result = saq(*options, "--run-dir", tmp_path / "run", "--json")
    assert result.exit_code == 4
    found = json.loads(result.stdout)
    assert found["bops"] <= found["budget_bops"]
    assert not found["accuracy"]["met"]
    assert found["accuracy"]["needed_cost"] > found["budget_bops"]
    assert " % more)" in last_error(result)

    met = search(network, tmp_path / "met", "--budget", "w8a8", "--max-drop", 8)
    assert met["accuracy"]["met"]
    plain = search(network, tmp_path / "plain", "--budget", "w8a8")
    assert met["policy"] == plain["policy"]
    assert "accuracy" not in plain


def test_interrupted_measurements_resume_to_the_same(
    network: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*("--max-drop", 8), "--set", "run.checkpoint_minutes=1e-6")
    whole = search(network, tmp_path / "whole", *options)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, "accuracy", None)
        stopped = saq("search", *network, *SMALL, *CALIBRATION, *options, "--run-dir", run, "--quiet")
    assert stopped.exit_code == 130
    assert "--resume" in last_line(stopped)
    assert (run / "checkpoints" / "accuracy.ckpt").exists()

    answer("search", "--run-dir", run, "--resume")
    assert figures(run) == figures(tmp_path / "whole")
    assert whole["accuracy"]["measured"] > 2


def test_quantize_reports_validation_beside_the_bound(network: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = answer("quantize", *network, *QUICK, "--min-top1", 60, "--epochs", 0, "--run-dir", run)
    accuracy = found["accuracy"]
    assert accuracy["allowed_drop"] == pytest.approx(found["float_top1"] - 60)
    assert accuracy["validation_drop"] == found["float_top1"] - found["top1"]
    assert accuracy["method"] == "calibrated"
    report = (run / "report.md").read_text()
    assert f"validation {accuracy['validation_drop']:.2f}" in report


def test_trials_measure_fine_tuned_accuracy(network: list[object], tmp_path: Path) -> None:
    options = (*QUICK, "--max-drop", 2, "--epochs", 1, "--set", "search.trials=2", "--method", "qat")
    found = answer("quantize", *network, *options, "--run-dir", tmp_path / "run")
    calibrated = search(network, tmp_path / "search", "--max-drop", 2)
    assert found["bops"] <= calibrated["bops"]
    assert found["accuracy"]["method"] in ("calibrated", "fine-tuned")
    assert found["epochs"] == 1


# Errors and plans


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--max-drop", 1, "--min-top1", 70), "bound the same accuracy"),
        (("--max-drop", 1, "--bits", 4), "give exactly one of"),
        (("--max-drop", 1, "--policy", "none.json"), "give exactly one of"),
        (("--max-drop", -1), "max-drop"),
        (("--min-top1", 170), "100"),
        (("--max-drop", 1, "--set", "search.proxy={}"), "search.proxy"),
        (("--max-drop", 1, "--no-pretrained"), "trained float network"),
    ],
)
def test_bad_bounds_are_refused(
    options: tuple[object, ...], expected: str, digits: Path, tmp_path: Path
) -> None:
    given = float_options(digits, digits / "few")
    given = given[2:] if "--no-pretrained" in options else given
    result = saq("quantize", MODEL, *given, *options, "--run-dir", tmp_path / "run", "--dry-run")
    assert result.exit_code in (1, 2)
    assert expected in result.stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_states_measurements_and_trials(network: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shown = saq("quantize", *network, *QUICK, "--max-drop", 1, "--run-dir", run, "--dry-run").stdout
    assert "--max-drop 1: the fewest bit-operations" in shown
    flat = " ".join(shown.split())
    assert "configurations at most, then in up to 3 trials" in flat
    plan = answer("quantize", *network, *QUICK, "--max-drop", 1, "--epochs", 0, "--run-dir", run, "--dry-run")
    assert plan["accuracy"]["trials"] == 0
    assert plan["budget_bops"] is None
