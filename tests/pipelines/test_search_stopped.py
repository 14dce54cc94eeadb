"""``saq search`` interrupted by a signal and resumed, in this process and in others."""

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saqcli.cli import app
from saqcli.training import trainer
from tests.support.command_line import answer, last_error, last_line, saq
from tests.support.processes import (
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
    """An uninterrupted search."""
    path = tmp_path_factory.mktemp("searches") / "whole"
    finish(start("search", *network, *STOPPED, "--run-dir", path))
    return path


def test_signal_pauses_the_search(
    network: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("search", *network, *STOPPED, "--set", "search.epochs=1")
    whole, run = tmp_path / "whole", tmp_path / "run"
    answer(*command, "--run-dir", whole)
    with monkeypatch.context() as patch:
        stop_here(patch, 0, signal.SIGINT)
        stopped = saq(*command, "--run-dir", run, "--quiet")

    assert stopped.exit_code == 130
    assert last_line(stopped).startswith("Interrupted; progress saved. Resume with `saq ")
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    assert not (run / "policy.json").exists()
    assert "--resume" in last_error(saq(*command, "--run-dir", run))

    answer("search", "--run-dir", run, "--resume")
    assert (run / "policy.json").read_bytes() == (whole / "policy.json").read_bytes()
    assert figures(run) == figures(whole)
    assert not (run / "checkpoints" / "search.ckpt").exists()


@pytest.mark.slow  # starting processes dominates the time
@pytest.mark.parametrize(("phase", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_resumed_search_finds_the_same_policy(
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


def proxy_search(images: Path, classes: int = 100) -> list[object]:
    """A search on ``images`` as proxy for another network; dropout draws random numbers at every step."""
    settings = {
        "images": 96, "scoring_images": 32, "options.random.draws": 3,
        "proxy.input_size": 32, "proxy.epochs": 3, "proxy.data": images,
    }  # fmt: skip
    return [
        *("test_resnet", "--model-kwargs", "drop_rate=0.3", "--num-classes", classes, "--in-chans", 1),
        *("--input-size", 64, "--no-pretrained", "--mean", 0.305, "--std", 0.376, "--batch-size", 64),
        *("--workers", 0, "--searcher", "random"),
        *(word for key, value in settings.items() for word in ("--set", f"search.{key}={value}")),
    ]


@pytest.fixture
def three(digits: Path, tmp_path: Path) -> Path:
    """Three of the ten digits."""
    folder = tmp_path / "three"
    (folder / "train").mkdir(parents=True)
    for name in "123":
        (folder / "train" / name).symlink_to(digits / "images" / "train" / name)
    (folder / "val").symlink_to(folder / "train")
    return folder


def proxy_notes(text: str) -> list[str]:
    return [line for line in text.splitlines() if "proxy: training top-1" in line]


def test_proxy_training_resumes_too(three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at the end of an epoch, between two, within one, and in the search."""
    command = ("search", *proxy_search(three), "--budget", "w4a4")
    whole, run = tmp_path / "whole", tmp_path / "run"
    notes = proxy_notes(saq(*command, "--run-dir", whole).stderr)
    assert len(notes) == 3
    again: tuple[object, ...] = (*command, "--run-dir", run)
    steps, last, told = len(list(three.glob("train/*/*"))) // 64, [0, 0], ""
    assert steps > 4
    for stage, position in (
        ("proxy", [0, steps]), ("proxy", [1, 0]), ("proxy", [1, 4]), ("proxy", [2, 3]), ("search", None),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            seen = stop_at(patch, stage, position)
            stopped = saq(*again)
        assert stopped.exit_code == 130, stopped.stderr
        assert (run / "checkpoints" / f"{stage}.ckpt").exists()
        again = ("search", "--run-dir", run, "--resume")
        if position is not None:
            assert seen[0] == ([1, 0] if last == [0, steps] else [last[0], last[1] + 1])
            last = position
        told += stopped.stderr
    with monkeypatch.context() as patch:  # where training is finished
        make = trainer.make_objective
        patch.setattr(
            trainer, "make_objective", lambda *given: (signal.raise_signal(signal.SIGTERM), make(*given))[1]
        )
        stopped = saq(*again)
    assert stopped.exit_code == 143, stopped.stderr

    answer("search", "--run-dir", run, "--resume")
    assert proxy_notes(told) == notes
    assert (run / "policy.json").read_bytes() == (whole / "policy.json").read_bytes()
    assert figures(run) == figures(whole)
    assert not list((run / "checkpoints").iterdir())


def test_resume_with_another_proxy_is_refused(
    three: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images are not the ones that were trained and evaluated on."""
    run = tmp_path / "run"
    given = (*proxy_search(three, 10), "--data", digits / "images", "--bops", "w4a4", "--epochs", 0)
    with monkeypatch.context() as patch:
        stop_at(patch, "proxy", [1, 0])
        stopped = saq("quantize", *given, "--run-dir", run)
    assert stopped.exit_code == 130, stopped.stderr
    (three / "train" / "3").rename(three / "train" / "0")

    refused = saq("quantize", "--run-dir", run, "--resume")
    assert refused.exit_code == 1
    assert "are not those that the run started with" in last_error(refused)
