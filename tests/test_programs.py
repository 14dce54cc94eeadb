"""The programs of docs/python.md run as they stand, and do what the page says."""

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
PERCENT = re.compile(r"([\d.]+) %")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All programs of the page."""
    made = tmp_path_factory.mktemp("programs")
    for name, text in FILES.items():
        (made / name).write_text(text, encoding="utf-8")
    return made


def run(folder: Path, name: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(PAGE.parents[1])}
    done = subprocess.run(
        [sys.executable, name], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_page_has_five_programs() -> None:
    assert len(FILES) == 6
    assert SHARED in FILES


def test_post_training_keeps_accuracy(folder: Path) -> None:
    exact, quantized = map(float, PERCENT.findall(run(folder, "post_training.py").splitlines()[-1]))
    assert exact > 85
    assert quantized > exact - 5
    assert (folder / "net.safetensors").is_file()


def test_post_training_takes_ten_lines() -> None:
    assert len([line for line in FILES["post_training.py"].splitlines() if line]) <= 10


def test_own_loop_improves_on_calibration(folder: Path) -> None:
    found = [
        float(line[-1]) for line in map(PERCENT.findall, run(folder, "own_loop.py").splitlines()) if line
    ]
    assert len(found) == 5
    assert found[-1] > found[0]


def test_two_heads_train(folder: Path) -> None:
    assert re.search(r"loss 0\.\d+$", run(folder, "two_heads.py"), re.MULTILINE)


def test_search_stays_within_the_budget(folder: Path) -> None:
    lines = run(folder, "search.py").splitlines()
    cost = float(re.findall(r"searched: ([\d.]+) MBOPs", lines[1])[0])
    searched, two, three = (float(PERCENT.findall(line)[0]) for line in lines[1:])
    assert cost <= 2.9
    assert searched > two - 3
    assert three > two - 3


def test_exported_file_is_verified(folder: Path) -> None:
    assert "verified on 397 images" in run(folder, "export.py")
