"""The scripts in ``benchmarks/`` import the package as it is, and their page of results is what they make of it."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted([*FOLDER.glob("*.py"), *FOLDER.glob("peers/*.py")])


@pytest.fixture(autouse=True)
def own_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts import each other by name; afterwards these names are free for others."""
    monkeypatch.syspath_prepend(str(FOLDER / "peers"))
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name, module in list(sys.modules.items()):
        if FOLDER in Path(getattr(module, "__file__", None) or "/").parents:
            del sys.modules[name]


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / name), run_name="imported")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_benchmark_can_be_imported(path: Path) -> None:
    runpy.run_path(str(path), run_name="imported")


def test_step_time_prints_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["float", "qat_eager", "saq_norms_eager", "lsq_bf16"]
    asked = f"--model saq/resnet8s --batch-size 2 --rounds 1 --quick --json --variants {','.join(names)}"
    monkeypatch.setattr(sys, "argv", ["step_time.py", *asked.split()])
    script("step_time.py")["main"]()
    found = json.loads(capsys.readouterr().out)
    assert not found["errors"]
    assert all(found[name] > 0 for name in names)
    assert all(found["peak_mb"][name] > 0 for name in ("float", "qat_eager"))
    assert {"date", "cpu", "isa", "threads", "torch", "command", "side"} <= found.keys()


def test_every_named_variant_exists() -> None:
    steps = script("step_time.py")
    for name in (*steps["QUICK"], *steps["FULL"]):
        steps["variant_of"](name)
    with pytest.raises(ValueError, match="saq_norms_eagerly is no variant"):
        steps["variant_of"]("saq_norms_eagerly")


def test_results_page_is_current() -> None:
    assert script("results.py")["page"]() == (FOLDER / "RESULTS.md").read_text(encoding="utf-8")


def test_tables_of_the_documentation_are_current() -> None:
    text = (FOLDER.parent / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert script("tables.py")["page"](text) == text


def test_goals_with_kernels_are_relative_to_eager_float() -> None:
    seconds = {
        "float_eager": 1.0,
        "qat_eager": 1.3,
        "qat_kernels": 1.05,
        "float": 0.9,
        "qat": 0.99,
        "saq": 1.8,
    }
    ran_as = {
        "float_eager": "as written",
        "qat_eager": "as written",
        "qat_kernels": "with fused kernels",
        "float": "channels_last",
        "qat": "with fused kernels, channels_last",
        "saq": "channels_last",
    }
    modes = ["default", "eager", "kernels"]
    results = script("results.py")
    rows = results["goals"](
        {**seconds, "ran_as": ran_as, "peak_mb": {"float_eager": 100, "qat_kernels": 110}}, modes
    )
    assert rows[0][2:] == ["**1.10**", "1.30", "**1.05**"]
    assert rows[1][2:] == ["", "", ""]  # SAQ and QAT by default computed in different ways
    assert rows[-1][2:] == ["", "", "**1.10**"]
    assert results["cell"](seconds, "qat", "kernels") == "1.05 (1050 ms)"
