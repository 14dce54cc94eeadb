"""A minimizer of another package, GSAM: the contract tests of minimizers, and the command line."""

import json
from pathlib import Path

import pytest

from tests.support.digits import MODEL, float_options
from tests.support.plugins import plugin_folder, run_python, run_saq, run_tests

CONTRACT = [f"tests/training/test_{name}.py" for name in ("minimizers", "efficient", "training", "recovery")]


@pytest.fixture(scope="module")
def folder() -> Path:
    return plugin_folder("saq-gsam")


def test_contract_tests_pass(folder: Path) -> None:
    done = run_tests(*CONTRACT, "-k", "gsam", folders=(folder,))

    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_zero_alpha_is_saq(folder: Path) -> None:
    """And another one differs."""
    program = """
from tests.support.steps import assert_bitwise_equal, batch, chunks_of, make, sgd, snapshot, trainable

ends = []
for method, options in (("saq", {}), ("gsam", {"alpha": 0.0}), ("gsam", {})):
    model = trainable("conv_bn")
    base = sgd(model)
    minimizer = make(method, model, base, **options)
    for step in range(3):
        minimizer.step(chunks_of(model, batch(16, seed=step), 8))
    ends.append(snapshot(model, base))
assert_bitwise_equal(*ends[:2])
try:
    assert_bitwise_equal(*ends[1:])
except AssertionError:
    print("differs")
"""
    done = run_python(program, folders=(folder,))
    assert done.stdout == "differs\n", done.stderr


def test_command_line_trains_with_it(folder: Path, digits: Path, tmp_path: Path) -> None:
    given = (
        *("quantize", MODEL, *float_options(digits, digits / "few"), "--workers", 0, "--batch-size", 32),
        *("--bits", 4, "--epochs", 1, "--method", "gsam", "--no-export", "--run-dir", tmp_path / "run"),
    )
    done = run_saq(*given, "--set", "training.minimizer.alpha=0.3", "--json", folders=(folder,))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["minimizer"] == {
        "alpha": 0.3
    }


@pytest.mark.slow
def test_wrong_options_are_one_line(folder: Path) -> None:
    program = f"""
from tests.support.command_line import last_error, saq

for wrong in (["--set", "training.minimizer.alpha=-1"], ["--set", "training.minimizer.beta=1"],
              ["--ascent-fraction", 0.5], ["--method", "nosuch"]):
    data = ["--data", "tests", "--no-pretrained", "--run-dir", "no/such", "--bits", 4]
    print(last_error(saq("quantize", "{MODEL}", "--method", "gsam", *data, *wrong)))
"""
    done = run_python(program, folders=(folder,))
    says = (
        "alpha -1 is not possible: give a number from 0 on",
        "method gsam does not take --set training.minimizer.beta: it takes alpha, rho",
        "method gsam compares gradients of the same images: remove --ascent-fraction",
        "choose from qat, sam, case1, saq, asaq, gsam",
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(says), done.stdout + done.stderr
    assert all(text in line for text, line in zip(says, lines, strict=True)), lines


def test_help_lists_it(folder: Path) -> None:
    assert "gsam" in run_saq("quantize", "--help", folders=(folder,)).stdout
