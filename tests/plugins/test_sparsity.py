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


def test_help_lists_it_without_importing_it(folders: tuple[Path, ...]) -> None:
    done = run_python(HELP, folders=folders)
    assert done.returncode == 0, done.stderr
    assert "--sparsity" in done.stdout
    assert "package saq-sparsity: An instrument for saq" in " ".join(done.stdout.split())


def test_wrong_settings_are_one_line(folders: tuple[Path, ...]) -> None:
    lines = run_python(WRONG, folders=folders).stdout.splitlines()
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


def test_saq_analyze_writes_compares_and_resumes(
    folders: tuple[Path, ...], digits: Path, tmp_path: Path
) -> None:
    run, out, data = tmp_path / "run", tmp_path / "out", ("--data", digits / "few", "--images", 20)
    network, calibrated = float_options(digits, digits / "few"), ("--bits", 3, "--epochs", 0, "--no-export")
    answer("quantize", MODEL, *network, *calibrated, "--run-dir", run)
    file = run / "artifacts" / "model.safetensors"
    command = ("analyze", run, *data, "--sparsity", "--against", file, "--out", out)

    done = run_python(f"command = {[str(word) for word in command]}\n{ANALYZE}", folders=folders)
    assert done.returncode == 0, done.stderr
    shown, again, other = json.loads(done.stdout)

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
