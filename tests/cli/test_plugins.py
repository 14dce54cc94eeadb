"""Plugins of other packages in help, completion and errors, and broken ones: named in one line, disabled alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.digits import MODEL, float_options
from tests.support.plugins import run_python

FAMILIES = ("searchers", "instruments", "quantizers", "minimizers", "styles")
MODULE = """
from saqcli.searchers import SearcherEntry
from saqcli.searchers.baselines import Uniform
ENTRY, WORD = SearcherEntry(Uniform, "of another package"), "uniform"
"""
FAILING = """
from saqcli.analysis import Instrument, Reading
from saqcli.searchers import SearcherEntry

class Boom:
    def search(self, problem):
        raise ValueError("boom")

def measure(analyzed, settings, session):
    raise ValueError("boom")

SEARCHER, INSTRUMENT = SearcherEntry(Boom, "fails", uses_images=False), Instrument(measure, Reading)
"""
EXITS = "import sys\nsys.exit('no licence')"
RUN = ("--data", "tests", "--no-pretrained", "--run-dir", "no/such")
COMMANDS: dict[str, tuple[object, ...]] = {
    "profile": ("profile", "saq/resnet20", "--bits", 4, "--no-pretrained"),
    "help": ("search", "--help"),
    "analyze help": ("analyze", "--help"),
    "import error": ("search", MODEL, "--budget", "w4a4", "--searcher", "crash", *RUN),
    "wrong type": ("search", MODEL, "--budget", "w4a4", "--searcher", "wrong", *RUN),
    "unknown": ("search", MODEL, "--budget", "w4a4", "--searcher", "magic", *RUN),
    "first of two": ("search", MODEL, "--budget", "w4a4", "--searcher", "twice", *RUN),
    "instrument": ("analyze", MODEL, "--bits", 4, "--no-pretrained", "--data", "tests", "--crash"),
    "quantizer": ("quantize", MODEL, "--bits", 4, "--quantizer", "crash", *RUN),
    "minimizer": ("quantize", MODEL, "--bits", 4, "--method", "crash", *RUN),
}
SCRIPT = f"""
import json
from typer.testing import CliRunner
from saqcli.cli import app
from tests.support.command_line import saq

found = {{}}
for name, words in json.loads({json.dumps(json.dumps(COMMANDS))}).items():
    result = saq(*words)
    found[name] = [result.exit_code, result.stdout, result.stderr]
for words in ("saq search --searcher ", "saq quantize --method c"):
    environment = {{"_SAQ_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": words}}
    environment["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    found[words] = CliRunner().invoke(app, [], env=environment, prog_name="saq").stdout.split()
print(json.dumps(found))
"""
TELL = """
import json
from tests.support.command_line import saq

results = {name: saq(*words) for name, words in commands}
print(json.dumps({name: [result.exit_code, result.stderr] for name, result in results.items()}))
"""


def install(folder: Path, name: str, points: dict[str, str]) -> None:
    """A package that is nothing but entry points."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[saqcli.{f}]\n{lines}\n" for f, lines in points.items()))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the commands print where two broken packages and a good one are installed."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "good_module.py").write_text(MODULE)
    install(folder, "saq-good", {"searchers": "twice = good_module:ENTRY\nother = good_module:ENTRY"})
    install(folder, "saq-second", {"searchers": "twice = second_module:ENTRY"})
    broken = dict.fromkeys(FAMILIES, "crash = no_such_module:ENTRY")
    broken["searchers"] += "\nwrong = good_module:WORD\nsamq = good_module:ENTRY\na/b = good_module:ENTRY"
    (folder / "exits_module.py").write_text(EXITS)
    broken["searchers"] += "\nexits = exits_module:ENTRY"
    install(folder, "saq-broken", broken)
    done = run_python(SCRIPT, folders=(folder,))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_lists_other_packages(found: Any) -> None:
    shown = " ".join(found["help"][1].split())
    assert "random, error, uniform, a/b, crash, exits, other, twice or wrong" in shown
    assert "--crash" in found["analyze help"][1]
    assert found["help"][2] == ""


def test_completion_lists_other_packages(found: Any) -> None:
    assert found["saq search --searcher "][-5:] == ["crash", "exits", "other", "twice", "wrong"]
    assert found["saq quantize --method c"] == ["case1", "crash"]


def test_broken_plugins_disturb_no_other_command(found: Any) -> None:
    assert found["profile"][0] == 0
    assert found["profile"][2] == ""


def test_broken_plugins_are_a_line_each(found: Any) -> None:
    code, _, stderr = found["import error"]
    lines = stderr.splitlines()
    assert code == 1
    assert lines[:-1] == [
        "warning: searcher a/b of package saq-broken is disabled, since its name is not made of letters, digits, - "
        "and _",
        "warning: searcher crash of package saq-broken is disabled, it cannot be loaded (ModuleNotFoundError: No "
        "module named 'no_such_module')",
        "warning: searcher exits of package saq-broken is disabled, it cannot be loaded (SystemExit: no licence)",
        "warning: searcher samq of package saq-broken is disabled, since saq has one of that name",
        "warning: searcher twice of package saq-second is disabled, since the name is taken already",
        "warning: searcher wrong of package saq-broken is disabled, since it does not keep the contract: it is a str, "
        "not a SearcherEntry",
    ]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("import error", "searcher crash of package saq-broken is disabled"),
        ("wrong type", "not a SearcherEntry: mend or remove that package, or choose another"),
        (
            "unknown",
            "there is no searcher 'magic': choose from samq, asga, hawq, sensitivity, fisher, swaps, random, error",
        ),
        ("unknown", "uniform, other, twice"),
        ("instrument", "instrument crash of package saq-broken is disabled, it cannot be loaded"),
        ("quantizer", "quantizer crash of package saq-broken is disabled"),
        ("minimizer", "crash of package saq-broken is disabled"),
    ],
)
def test_asking_for_a_broken_plugin_is_one_error(command: str, says: str, found: Any) -> None:
    code, _, stderr = found[command]
    assert code == 1
    assert says in stderr.splitlines()[-1]


def test_failing_plugins_are_named(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "failing_module.py").write_text(FAILING)
    points = {
        "searchers": "boom = failing_module:SEARCHER",
        "instruments": "boom = failing_module:INSTRUMENT",
    }
    install(tmp_path, "saq-boom", points)
    network = (MODEL, *float_options(digits, digits / "few"), "--workers", 0)
    search = ("search", *network, "--budget", "w4a4", "--searcher", "boom", "--run-dir", tmp_path / "run")
    analyze = ("analyze", *network, "--bits", 4, "--images", 20, "--boom", "--out", tmp_path / "out")
    commands = {"searcher": search, "instrument": analyze, "traceback": (*search, "--overwrite", "--verbose")}
    told = [[name, [str(word) for word in command]] for name, command in commands.items()]
    done = run_python(f"commands = {told}\n{TELL}", folders=(tmp_path,))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for word in ("searcher", "instrument"):
        code, stderr = found[word]
        assert code == 1
        assert stderr.splitlines()[-1] == (
            f"error: {word} boom of package saq-boom failed (ValueError: boom): mend or remove that package, or "
            "choose another"
        )
    assert "raise ValueError" in found["traceback"][1]


def test_first_of_two_packages_keeps_the_name(found: Any) -> None:
    code, _, stderr = found["first of two"]
    assert code == 1  # for want of images
    assert "twice" not in stderr
