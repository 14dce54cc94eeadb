"""Completion in bash, zsh and fish: models, runs and the choices of options, without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saqcli.cli import app
from tests.support.runs import make_run

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def variables(line: str, shell: str) -> dict[str, str]:
    """What a shell sets when the user presses Tab after ``line``."""
    return {
        "_SAQ_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }


def complete(line: str, shell: str = "bash") -> list[str]:
    result = CliRunner().invoke(app, [], prog_name="saq", env=variables(line, shell))
    assert result.exit_code == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("saq quan", "quantize"),
        ("saq quantize resnet1", "resnet18"),
        ("saq quantize torchvision/resnet1", "torchvision/resnet18"),
        ("saq quantize saq/pre", "saq/preresnet20"),
        ("saq search saq/resnet20 --searcher fi", "fisher"),
        ("saq search saq/resnet20 --recipe mi", "minutes"),
        ("saq quantize saq/resnet20 --target ort", "ort-cpu"),
        ("saq quantize saq/resnet20 --method as", "asaq"),
        ("saq export --style tr", "trt"),
        ("saq targets open", "openvino"),
        ("saq runs comp", "compare"),
        ("saq runs show lat", "latest"),
        ("saq eval runs/a", "runs/a"),
        ("saq rerun work/on", "work/only"),
        ("saq quantize saq/resnet20 --policy runs/a", "runs/a"),
    ],
)
def test_every_shell_completes(line: str, offers: str, shell: str) -> None:
    make_run("runs/a", age=1)
    make_run("work/only", age=1)

    found = [text.strip("\"'():") for text in complete(line, shell)]

    assert any(offers in text for text in found), found


def test_runs_come_newest_first_then_latest_and_folders() -> None:
    make_run("runs/old", age=9)
    make_run("runs/new", age=1)
    Path("exported.onnx").touch()
    Path("notes.txt").touch()

    assert complete("saq eval ") == ["runs/new", "runs/old", "latest", "runs/", "exported.onnx"]
    assert complete("saq export ") == ["runs/new", "runs/old", "latest", "runs/"]


def test_nothing_is_offered_where_nothing_fits() -> None:
    assert complete("saq export nosuch") == []
    assert complete("saq quantize nosuch") == []


def test_completion_imports_neither_torch_nor_timm() -> None:
    code = (
        "import sys; sys.argv = ['saq']\nfrom saqcli.cli import main\ntry:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'timm', 'numpy', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    for line in ("saq quantize resnet1", "saq eval ", "saq search x --searcher "):
        environment = {**os.environ, **variables(line, "bash")}

        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

        assert done.stderr.strip() == "[]"
