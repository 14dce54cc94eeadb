"""The scripts in ``benchmarks/`` import the package as it is."""

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_benchmark_can_be_imported(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    try:
        runpy.run_path(str(script), run_name="imported")
    finally:
        for name, module in list(sys.modules.items()):  # of other scripts, whose names others may want
            if Path(getattr(module, "__file__", None) or "/").parent == FOLDER:
                del sys.modules[name]
