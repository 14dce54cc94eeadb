"""``saq quantize`` that is stopped in its search and goes on, in processes of its own."""

import json
import signal
from pathlib import Path

import pytest

from tests.processes import STOPPED, figures, finish, network_options, start, stop_in_phase


@pytest.mark.slow  # by themselves: test_cli stops quantize, test_search_stopped a search
def test_quantize_searches_first_and_goes_on_after_a_stop_in_the_search(digits: Path, tmp_path: Path) -> None:
    options = (*network_options(digits), *STOPPED, "--epochs", 1)
    whole, run = tmp_path / "whole", tmp_path / "run"
    running = start("quantize", *options, "--run-dir", whole)
    told = stop_in_phase(start("quantize", *options, "--run-dir", run), run, 1, signal.SIGINT)
    assert "saq quantize --run-dir" in told
    finish(start("quantize", "--run-dir", run, "--resume"))
    finish(running)

    assert figures(run) == figures(whole)
    one, other = (json.loads((path / "manifest.json").read_text()) for path in (run, whole))
    assert one["results"]["policy"] == figures(whole)["policy"]
    assert one["results"]["bops"] <= one["results"]["budget_bops"]
    assert one["artifacts"]["artifacts/model.onnx"] == other["artifacts"]["artifacts/model.onnx"]
    assert (run / "policy.png").is_file()
    assert not (run / "checkpoints" / "search.pt").exists()
