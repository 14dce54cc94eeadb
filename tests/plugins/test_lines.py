"""The package saq-lines: the contract of trackers, and the command line."""

from pathlib import Path

import pytest

from tests.support.digits import MODEL, float_options
from tests.support.plugins import plugin_folder, run_saq, run_tests


@pytest.fixture(scope="module")
def folders() -> tuple[Path, ...]:
    return (plugin_folder("saq-lines"),)


def test_keeps_the_contract_of_trackers(folders: tuple[Path, ...]) -> None:
    done = run_tests("tests/runs/test_trackers.py", "-k", "lines", folders=folders)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_works_from_the_command_line(folders: tuple[Path, ...], digits: Path, tmp_path: Path) -> None:
    options = ("--bits", 8, "--epochs", 0, "--no-export", "--workers", 0, "--track", "lines")
    done = run_saq(
        "quantize", MODEL, *float_options(digits), *options, "--run-dir", tmp_path / "run", folders=folders
    )

    assert done.returncode == 0, done.stderr
    first, *lines, last = (tmp_path / "run.lines").read_text(encoding="utf-8").splitlines()
    assert first == f"started {MODEL}"
    assert [line.split("/")[0] for line in lines] == ["0 float", "0 calibrated", "0 quantized"]
    assert last == "finished"
