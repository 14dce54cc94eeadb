"""``saq search`` that is stopped by a signal and goes on, in processes of its own."""

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saqcli.cli import app
from tests.processes import STOPPED, figures, finish, network_options, start, stop_in_phase
from tests.sweeps import sweep


@pytest.fixture(scope="module")
def network(digits: Path) -> list[object]:
    return network_options(digits)


@pytest.fixture(scope="module")
def whole(network: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nobody stopped."""
    path = tmp_path_factory.mktemp("searches") / "whole"
    finish(start("search", *network, *STOPPED, "--run-dir", path))
    return path


@pytest.mark.parametrize(
    ("phase", "number"), sweep([(0, signal.SIGTERM), (1, signal.SIGINT)], lambda phase, _: phase == 1)
)
def test_a_search_stopped_by_a_signal_goes_on_to_the_same_policy(
    phase: int, number: int, whole: Path, network: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    told = stop_in_phase(start("search", *network, *STOPPED, "--run-dir", run), run, phase, number)

    assert "saq search --run-dir" in told
    assert "--resume" in told
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    assert not (run / "policy.json").exists()

    refused = CliRunner().invoke(
        app, ["search", *map(str, network), *map(str, STOPPED), "--run-dir", str(run)]
    )
    assert refused.exit_code == 1
    assert "--resume" in refused.stderr

    finish(start("search", "--run-dir", run, "--resume"))
    assert (run / "policy.json").read_bytes() == (whole / "policy.json").read_bytes()
    assert figures(run) == figures(whole)
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
    assert not (run / "checkpoints" / "search.pt").exists()
