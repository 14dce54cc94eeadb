"""The package saq-greedy: the contract of searchers, the command line, and resuming."""

import json
from pathlib import Path

import pytest

from tests.support.digits import MODEL, float_options
from tests.support.plugins import plugin_folder, run_python, run_saq, run_tests

IMAGES = ("--search-images", 96, "--scoring-images", 24, "--batch-size", 32, "--workers", 0)
FEW = ("--candidates", "3,4,8", "--pin", "layer[12].*=4")
RESUME = """
from saqcli.errors import Interrupted
from saqcli.searchers import SEARCHERS
from tests.support.searching import Stopping, fresh, tiny_problem

problem = tiny_problem("conv_bn", rules={"*": "2-8"})
def search(memory):
    found = SEARCHERS["greedy"].make(by="loss").search(fresh(problem, memory=memory))
    return found.choice, [found.score(one.choice) == one for one in found.scored], list(found.scored)
whole = Stopping()
expected = search(whole)
assert whole.offers > 4
stopped = Stopping(stop_after=3)
try:
    search(stopped)
except Interrupted:
    resumed = Stopping(kept=stopped.kept)
    assert search(resumed) == expected
    print(whole.offers - resumed.offers)
"""

WRONG = f"""
from tests.support.command_line import last_error, saq

for wrong in (["--set", "search.options.greedy.by=luck"], ["--set", "search.options.greedy.x=1"], ["--epochs", 1]):
    data = ["--data", "tests", "--no-pretrained", "--run-dir", "no/such"]
    print(last_error(saq("search", "{MODEL}", "--budget", "w4a4", "--searcher", "greedy", *data, *wrong)))
"""


@pytest.fixture(scope="module")
def folders() -> tuple[Path, ...]:
    return (plugin_folder("saq-greedy"),)


def test_keeps_the_contract_of_searchers(folders: tuple[Path, ...]) -> None:
    done = run_tests(
        "tests/searchers/test_searchers.py", "tests/pipelines/test_search.py", "-k", "greedy", folders=folders
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.fixture(scope="module")
def told(folders: tuple[Path, ...]) -> tuple[str, str, str]:
    """What both programs print in one process, the wrong options first, and their errors."""
    done = run_python(f"{WRONG}\nprint()\n{RESUME}", folders=folders)
    wrong, _, resumed = done.stdout.partition("\n\n")
    return wrong, resumed, done.stderr


def test_search_resumes_after_an_interruption(told: tuple[str, str, str]) -> None:
    _, resumed, stderr = told
    assert resumed == "3\n", stderr


@pytest.mark.slow
def test_saq_search_takes_its_options(folders: tuple[Path, ...], digits: Path, tmp_path: Path) -> None:
    network = (MODEL, *float_options(digits, digits / "few"), *IMAGES, *FEW)
    options = ("--set", "search.options.greedy.by=loss", "--run-dir", tmp_path / "run", "--json")
    done = run_saq("search", *network, "--budget", "w4a4", "--searcher", "greedy", *options, folders=folders)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["searcher"] == "greedy"
    assert found["bops"] <= found["budget_bops"]
    assert found["scored"] > 1


@pytest.mark.slow  # saq search with it is tested above
def test_saq_quantize_searches_with_it(folders: tuple[Path, ...], digits: Path, tmp_path: Path) -> None:
    network = (MODEL, *float_options(digits, digits / "few"), *IMAGES[4:])
    options = ("--epochs", 0, "--no-export", "--run-dir", tmp_path / "run", "--json")
    done = run_saq("quantize", *network, "--bops", "w3a3", "--searcher", "greedy", *options, folders=folders)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bops"] <= found["budget_bops"]


def test_wrong_options_are_one_line(told: tuple[str, str, str]) -> None:
    wrong, _, stderr = told
    says = (
        "by 'luck' is not known: choose from error, loss",
        "searcher greedy has no x: its options are by",
        "searcher greedy does not train: remove --epochs",
    )
    lines = wrong.splitlines()
    assert len(lines) == len(says), stderr
    assert all(text in line for text, line in zip(says, lines, strict=True)), lines
