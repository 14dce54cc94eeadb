"""A minimizer of another package, GSAM: the contract tests of minimizers, and the command line."""

import json
from pathlib import Path

import pytest

from tests.support.digits import MODEL, float_options
from tests.support.plugins import Done, plugin_folder, run_python, run_tests

CONTRACT = [f"tests/training/test_{name}.py" for name in ("minimizers", "efficient", "training", "recovery")]


@pytest.fixture(scope="module")
def folder() -> Path:
    return plugin_folder("saq-gsam")


def test_contract_tests_pass(folder: Path) -> None:
    done = run_tests(*CONTRACT, "-k", "gsam", folders=(folder,))

    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


PROGRAM = """
import json
from tests.support.command_line import saq
from tests.support.steps import assert_bitwise_equal, batch, chunks_of, make, sgd, snapshot, trainable

trained = saq(*command)
print(json.dumps([saq("quantize", "--help").stdout, trained.exit_code, trained.stderr]))
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gsam") / "run"


@pytest.fixture(scope="module")
def done(folder: Path, digits: Path, run: Path) -> Done:
    """One process that trains by the command line, prints its help, and compares steps with those of SAQ."""
    given = (
        *("quantize", MODEL, *float_options(digits, digits / "few"), "--workers", 0, "--batch-size", 32),
        *("--bits", 4, "--epochs", 1, "--method", "gsam", "--no-export", "--run-dir", run),
        *("--set", "training.minimizer.alpha=0.3", "--json"),
    )
    return run_python(f"command = {[str(word) for word in given]}\n{PROGRAM}", folders=(folder,))


def test_zero_alpha_is_saq(done: Done) -> None:
    """And another one differs."""
    assert done.stdout.splitlines()[1:] == ["differs"], done.stderr


def test_command_line_trains_with_it(done: Done, run: Path) -> None:
    _, code, stderr = json.loads(done.stdout.splitlines()[0])
    assert code == 0, stderr
    assert json.loads((run / "config.json").read_text())["training"]["minimizer"] == {"alpha": 0.3}


def test_help_lists_it(done: Done) -> None:
    assert "gsam" in json.loads(done.stdout.splitlines()[0])[0]


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
