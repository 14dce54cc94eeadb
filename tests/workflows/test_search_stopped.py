"""``saq search`` that is stopped by a signal and goes on, in this process and in processes of its own."""

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saqcli.cli import app
from tests.command_line import answer, last_error, saq
from tests.digits import MODEL
from tests.processes import (
    STOPPED,
    figures,
    finish,
    network_options,
    start,
    stop_at,
    stop_here,
    stop_in_phase,
)


@pytest.fixture(scope="module")
def network(digits: Path) -> list[object]:
    return network_options(digits)


@pytest.fixture(scope="module")
def whole(network: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nobody stopped."""
    path = tmp_path_factory.mktemp("searches") / "whole"
    finish(start("search", *network, *STOPPED, "--run-dir", path))
    return path


def test_a_signal_in_the_middle_of_a_search_stops_it_for_a_while(
    network: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("search", *network, *STOPPED, "--set", "search.epochs=1")
    whole, run = tmp_path / "whole", tmp_path / "run"
    answer(*command, "--run-dir", whole)
    with monkeypatch.context() as patch:
        stop_here(patch, 0, signal.SIGINT)
        stopped = saq(*command, "--run-dir", run, "--quiet")

    assert stopped.exit_code == 130
    assert "--resume" in last_error(stopped)
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    assert not (run / "policy.json").exists()
    assert "--resume" in last_error(saq(*command, "--run-dir", run))

    answer("search", "--run-dir", run, "--resume")
    assert (run / "policy.json").read_bytes() == (whole / "policy.json").read_bytes()
    assert figures(run) == figures(whole)
    assert not (run / "checkpoints" / "search.ckpt").exists()


@pytest.mark.slow  # starting processes takes longer than what they do
@pytest.mark.parametrize(("phase", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
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
    assert not (run / "checkpoints" / "search.ckpt").exists()


def test_fitting_the_network_of_a_proxy_goes_on_too(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within its training, twice, between two epochs of it, and in the search that follows."""
    command = (
        *("search", MODEL, "--num-classes", 100, "--in-chans", 1, "--input-size", 32, "--no-pretrained"),
        *("--mean", 0.305, "--std", 0.376, "--data", digits / "images", "--budget", "w4a4"),
        *("--proxy", "input_size=16,epochs=2", "--batch-size", 128, "--workers", 0),
        *("--search-images", 96, "--scoring-images", 32, "--searcher", "random"),
        *("--set", "search.options.random.draws=3"),
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    answer(*command, "--run-dir", whole)
    steps = 11
    again: tuple[object, ...] = (*command, "--run-dir", run)
    next_step = [0, 1]
    for stage, position in (
        ("proxy", [0, 4]), ("proxy", [0, steps]), ("proxy", [1, 0]), ("proxy", [1, 3]), ("search", None),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            seen = stop_at(patch, stage, position)
            stopped = saq(*again, "--quiet")
        assert stopped.exit_code == 130, stopped.stderr
        assert (run / "checkpoints" / f"{stage}.ckpt").exists()
        again = ("search", "--run-dir", run, "--resume")
        if position is not None:
            assert seen[0] == next_step
            next_step = [1, 0] if position == [0, steps] else [position[0], position[1] + 1]

    answer("search", "--run-dir", run, "--resume")
    assert (run / "policy.json").read_bytes() == (whole / "policy.json").read_bytes()
    assert figures(run) == figures(whole)
    assert not list((run / "checkpoints").iterdir())
