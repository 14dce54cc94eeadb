"""``saq quantize`` interrupted during its search and resumed, in this process and in others."""

import json
import signal
from pathlib import Path

import pytest

from tests.support.command_line import answer, last_line, saq
from tests.support.processes import STOPPED, figures, finish, network_options, start, stop_here, stop_in_phase


def check_same(run: Path, whole: Path) -> None:
    assert figures(run) == figures(whole)
    one, other = (json.loads((path / "manifest.json").read_text()) for path in (run, whole))
    assert one["results"]["policy"] == figures(whole)["policy"]
    assert one["results"]["bops"] <= one["results"]["budget_bops"]
    assert one["artifacts"]["artifacts/model.onnx"] == other["artifacts"]["artifacts/model.onnx"]
    assert (run / "policy.png").is_file()
    assert not (run / "checkpoints" / "search.ckpt").exists()


def test_resume_after_interrupt_during_search(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--data", digits / "few", "--set", "search.epochs=1", "--set", "data.verify_images=20")
    options = (*network_options(digits), *STOPPED, *few, "--epochs", 0)
    whole, run = tmp_path / "whole", tmp_path / "run"
    answer("quantize", *options, "--run-dir", whole)
    with monkeypatch.context() as patch:
        stop_here(patch, 1, signal.SIGTERM)
        stopped = saq("quantize", *options, "--run-dir", run, "--quiet")

    assert stopped.exit_code == 143
    assert last_line(stopped).startswith("Interrupted; progress saved. Resume with `saq quantize --run-dir")
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    answer("quantize", "--run-dir", run, "--resume")
    check_same(run, whole)


@pytest.mark.slow  # starting processes dominates the time
def test_search_precedes_training_and_resumes(digits: Path, tmp_path: Path) -> None:
    options = (*network_options(digits), *STOPPED, "--epochs", 1)
    whole, run = tmp_path / "whole", tmp_path / "run"
    running = start("quantize", *options, "--run-dir", whole)
    told = stop_in_phase(start("quantize", *options, "--run-dir", run), run, 1, signal.SIGINT)
    assert "saq quantize --run-dir" in told
    finish(start("quantize", "--run-dir", run, "--resume"))
    finish(running)

    check_same(run, whole)
