"""The package saq-sparsity: the contract of instruments, and ``saq analyze``."""

import json
from pathlib import Path

import pytest

from tests.support.command_line import answer
from tests.support.digits import MODEL, float_options
from tests.support.plugins import plugin_folder, run_python, run_tests

HELP = """
from tests.support.command_line import saq
import sys
shown = saq("analyze", "--help").stdout
assert "saq_sparsity" not in sys.modules
print(shown)
"""
WRONG = f"""
from tests.support.command_line import last_error, saq
for wrong in (
    ["--sparsity", "--set", "sparsity.nothing=1"], ["--sparsity", "--set", "sparsity.threshold=x"],
    ["--flips", "--set", "sparsity.threshold=0.1"], ["--sparsity", "--set", "threshold=0.1"],
    ["--flips", "--set", "flips.rho=1"], ["--flips", "--set", "magic.rho=1"],
):
    print(last_error(saq("analyze", "{MODEL}", "--bits", 4, "--no-pretrained", *wrong)))
"""

ANALYZE = """
import json
from tests.support.command_line import saq
setting = ("--set", "sparsity.threshold=0.2")
found = []
for more in ((*setting, "--quiet"), (*setting, "--resume", "--json"), ("--resume", "--quiet")):
    result = saq(*command, *more)
    found.append([result.exit_code, result.stdout, result.stderr])
print(json.dumps(found))
"""
BETWEEN = "=" * 20


@pytest.fixture(scope="module")
def folders() -> tuple[Path, ...]:
    return (plugin_folder("saq-sparsity"),)


def test_keeps_the_contract_of_instruments(folders: tuple[Path, ...]) -> None:
    done = run_tests(
        *("tests/analysis/test_instruments.py", "tests/report/test_pictures.py"),
        *("-k", "sparsity or float_layers"),
        folders=folders,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparsity") / "run"
    network, calibrated = float_options(digits, digits / "few"), ("--bits", 3, "--epochs", 0, "--no-export")
    answer("quantize", MODEL, *network, *calibrated, "--run-dir", path)
    return path


@pytest.fixture(scope="module")
def told(run: Path, digits: Path, folders: tuple[Path, ...]) -> list[str]:
    """What the three programs print in one process."""
    data, against = ("--data", digits / "few", "--images", 20), run / "artifacts" / "model.safetensors"
    command = ("analyze", run, *data, "--sparsity", "--against", against, "--out", run.parent / "out")
    given = f"command = {[str(word) for word in command]}\n"
    between = f"print({BETWEEN!r})\n"
    done = run_python(given + between.join((HELP, WRONG, ANALYZE)), folders=folders)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(f"{BETWEEN}\n")


def test_help_lists_it_without_importing_it(told: list[str]) -> None:
    assert "--sparsity" in told[0]
    assert "package saq-sparsity: An instrument for saq" in " ".join(told[0].split())


def test_wrong_settings_are_one_line(told: list[str]) -> None:
    lines = told[1].splitlines()
    says = (
        "--set sparsity.nothing=1: sparsity has no nothing: its settings are threshold",
        "settings of sparsity",
        "--set sparsity.threshold=0.1: sparsity is not measured: choose it too",
        "--set threshold=0.1: give NAME.KEY=VALUE",
        "--set flips.rho=1: flips has no rho: it has no settings of its own",
        "there is no instrument 'magic': choose from sharpness",
    )
    assert len(lines) == len(says)
    assert all(text in line for text, line in zip(says, lines, strict=True)), lines


def test_saq_analyze_writes_compares_and_resumes(told: list[str], run: Path) -> None:
    shown, again, other = json.loads(told[2])
    out = run.parent / "out"

    assert (shown[0], shown[2]) == (0, "")
    assert "weights at zero" in shown[1]
    kept = (out / "sparsity.json").read_bytes()
    tree = json.loads(kept)
    assert (tree["instrument"], tree["settings"]) == ("sparsity", {"threshold": 0.2})
    assert tree["reading"]["zeros"] > 0
    assert {path.name for path in out.iterdir()} == {
        "against",
        "report.html",
        "report.md",
        *(f"sparsity.{s}" for s in ("json", "png", "svg")),
    }
    found = json.loads(again[1])
    assert found["instruments"]["sparsity"] == found["against"]["instruments"]["sparsity"] == tree["reading"]
    assert other[0] == 1
    assert "threshold: 0.2 -> 0.0" in other[2]
