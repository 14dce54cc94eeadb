"""The programs of docs/python.md run as they stand, and do what the page says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"
BLOCK = re.compile(r"^```python (\S+\.py)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILES: dict[str, str] = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
SHARED = "digits.py"
Said = dict[str, tuple[str, str]]  # what a program printed and its error, by its name
PERCENT = re.compile(r"([\d.]+) %")


# Runs programs one after the other, each in its own namespace and folder, and writes what each printed.
RUN_ALL = """
import contextlib, io, json, pathlib, runpy, sys, traceback

said, here = {}, pathlib.Path().absolute()
for name in sys.argv[1:]:
    out, error = io.StringIO(), ""
    (own := here / name.removesuffix(".py")).mkdir()
    try:
        with contextlib.redirect_stdout(out), contextlib.chdir(own):
            runpy.run_path(str(here / name), run_name="__main__")
    except BaseException:
        error = traceback.format_exc()
    said[name] = (out.getvalue(), error)
json.dump(said, open("said.json", "w", encoding="utf-8"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All programs of the page."""
    made = tmp_path_factory.mktemp("programs")
    for name, text in FILES.items():
        (made / name).write_text(text, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def said(folder: Path) -> Said:
    """What every program printed, and its error."""
    environment = os.environ | {"PYTHONPATH": f"{PAGE.parents[1]}{os.pathsep}{folder}"}
    names = [name for name in FILES if name != SHARED]
    command = [sys.executable, "-c", RUN_ALL, *names]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: Said = json.loads((folder / "said.json").read_text(encoding="utf-8"))
    return found


def output(said: Said, name: str) -> str:
    printed, error = said[name]
    assert not error, error
    return printed


def test_page_has_five_programs() -> None:
    assert len(FILES) == 6
    assert SHARED in FILES


def test_post_training_keeps_accuracy(said: Said, folder: Path) -> None:
    exact, quantized = map(float, PERCENT.findall(output(said, "post_training.py").splitlines()[-1]))
    assert exact > 85
    assert quantized > exact - 5
    assert (folder / "post_training" / "net.safetensors").is_file()


def test_post_training_takes_ten_lines() -> None:
    assert len([line for line in FILES["post_training.py"].splitlines() if line]) <= 10


def test_own_loop_improves_on_calibration(said: Said) -> None:
    found = [
        float(line[-1]) for line in map(PERCENT.findall, output(said, "own_loop.py").splitlines()) if line
    ]
    assert len(found) == 5
    assert found[-1] > found[0]


def test_two_heads_train(said: Said) -> None:
    assert re.search(r"loss 0\.\d+$", output(said, "two_heads.py"), re.MULTILINE)


def test_search_stays_within_the_budget(said: Said) -> None:
    lines = output(said, "search.py").splitlines()
    cost = float(re.findall(r"searched: ([\d.]+) MBOPs", lines[1])[0])
    searched, two, three = (float(PERCENT.findall(line)[0]) for line in lines[1:])
    assert cost <= 2.9
    assert searched > two - 3
    assert three > two - 3


def test_exported_file_is_verified(said: Said) -> None:
    assert "verified on 397 images" in output(said, "export.py")
