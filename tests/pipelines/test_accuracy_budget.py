"""Accuracy as a budget of ``saq search`` and ``saq quantize``, on handwritten digits."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saqcli.runs.saving import SearchMemory
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


@pytest.fixture(scope="module")
def within_8(network: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A search for a drop of 8 points, and its run."""
    run = tmp_path_factory.mktemp("within_8") / "run"
    return search(network, run, "--max-drop", 8), run


def test_search_meets_a_drop_with_fewer_bits(within_8: tuple[dict[str, Any], Path]) -> None:
    found, run = within_8
    accuracy = found["accuracy"]
    assert accuracy["met"]
    assert accuracy["held_out_drop"] <= accuracy["allowed_drop"] == accuracy["max_drop"] == 8
    assert accuracy["held_out_drop"] == accuracy["held_out_float_top1"] - accuracy["held_out_top1"]
    assert accuracy["needed_cost"] == found["bops"]
    assert found["budget_bops"] is None
    assert found["scored"] >= accuracy["measured"] > 0  # the search itself scores some
    kept = json.loads((run / "search.json").read_text())
    good = [
        one["bops"] for one in kept["configurations"] if one["top1"] >= accuracy["held_out_float_top1"] - 8
    ]
    assert found["bops"] == min(good)
    assert found["scoring_top1"] == accuracy["held_out_top1"]
    assert not (run / "checkpoints" / "accuracy.ckpt").exists()


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


def test_more_than_float_is_said(network: list[object], tmp_path: Path) -> None:
    options = (*network, *SMALL, *CALIBRATION, "--pin", "*=2", "--min-top1", 100)
    result = saq("search", *options, "--run-dir", tmp_path / "run")
    assert result.exit_code == 4
    allowed = json.loads((tmp_path / "run" / "search.json").read_text())["accuracy"]["allowed_drop"]
    assert ("the float network itself is " in last_error(result)) == (allowed < 0)  # it may have 100 %
    assert (tmp_path / "run" / "policy.json").is_file()


def test_tight_budget_says_what_accuracy_needs(network: list[object], tmp_path: Path) -> None:
    options = (*("search", *network, *SMALL, *CALIBRATION, "--budget", "w2a2"), "--max-drop", 8)
    result = saq(*options, "--run-dir", tmp_path / "run", "--json")
    assert result.exit_code == 4
    found = json.loads(result.stdout)
    assert found["bops"] <= found["budget_bops"]
    assert not found["accuracy"]["met"]
    assert found["accuracy"]["needed_cost"] > found["budget_bops"]
    assert " % more)" in last_error(result)


def test_interrupted_measurements_resume_to_the_same(
    network: list[object],
    within_8: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = (*("--max-drop", 8), "--set", "run.checkpoint_minutes=1e-6")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, "accuracy", None)
        stopped = saq("search", *network, *SMALL, *CALIBRATION, *options, "--run-dir", run, "--quiet")
    assert stopped.exit_code == 130
    assert "--resume" in last_line(stopped)
    assert (run / "checkpoints" / "accuracy.ckpt").exists()

    answer("search", "--run-dir", run, "--resume")
    assert figures(run) == figures(within_8[1])
    assert within_8[0]["accuracy"]["measured"] > 2


def test_quantize_reports_validation_beside_the_bound(network: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = answer("quantize", *network, *QUICK, "--min-top1", 60, "--epochs", 0, "--run-dir", run)
    accuracy = found["accuracy"]
    assert accuracy["allowed_drop"] == pytest.approx(found["float_top1"] - 60)
    assert accuracy["validation_drop"] == found["float_top1"] - found["top1"]
    assert accuracy["method"] == "calibrated"
    report = (run / "report.md").read_text()
    assert f"validation {accuracy['validation_drop']:.2f}" in report


@pytest.mark.slow  # reconstruction and bisection are each interrupted in a test of their own
def test_interrupted_trials_resume_to_the_same(
    network: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        *(
            "quantize",
            *network,
            *QUICK,
            "--candidates",
            "2,8",
            "--max-drop",
            2,
            "--epochs",
            1,
            "--method",
            "qat",
        ),
        *("--compensate", "--reconstruct", "--iterations", 1, "--set", "search.trials=2"),
    )
    whole = answer(*options, "--run-dir", tmp_path / "whole")
    assert whole["accuracy"]["method"] in ("calibrated", "fine-tuned")
    run = tmp_path / "run"
    for number, stage in ((1, "reconstructed"), (2, "fine-tuned")):
        with monkeypatch.context() as patch:
            seen = stop_in_trial(patch, number, stage)
            stopped = saq(*options, "--run-dir", run, "--quiet", *(("--resume",) if number > 1 else ()))
        assert stopped.exit_code == 130, stopped.stderr
        assert seen[-1] == (number, stage)

    resumed = answer(*options, "--run-dir", run, "--resume")
    assert figures(run) == figures(tmp_path / "whole")
    assert resumed["accuracy"] == whole["accuracy"]
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def stop_in_trial(monkeypatch: pytest.MonkeyPatch, number: int, stage: str) -> list[tuple[int, str]]:
    """Let the run of this process get a signal in a stage of a trial, after its first step.

    Returns:
        Filled with the trials and stages up to there.
    """
    offer = SearchMemory.offer
    seen: list[tuple[int, str]] = []

    def stopping(self: SearchMemory, state: Callable[[], dict[str, Any]], **when: bool) -> None:
        kept = state()
        if "trial" in kept and "tried" in kept:
            seen.append((len(kept["tried"]) + 1, kept["trial"]["stage"]))
            if seen[-2:] == [(number, stage)] * 2:
                signal.raise_signal(signal.SIGINT)
        offer(self, state, **when)

    monkeypatch.setattr(SearchMemory, "offer", stopping)
    return seen


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
