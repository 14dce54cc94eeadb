"""The notebooks run from top to bottom, print what they hold, and are small."""

from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "docs" / "notebooks").glob("*.ipynb"))
ROOT = Path(__file__).resolve().parents[1]
LARGEST = 60_000  # bytes, outputs included


def executed(path: Path, folder: Path) -> Any:
    """The notebook with new outputs; ``python -m tests.test_notebooks`` keeps them."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        nbclient.NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": str(folder)}}
        ).execute()
    for cell in notebook.cells:
        cell.metadata = {}  # times of execution
        cell.pop("execution_count", None)
        if cell.cell_type == "code":  # warnings name folders of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            output.pop("execution_count", None)
            output.get("data", {}).pop("text/plain", None) if "image/png" in output.get("data", {}) else None
        if cell.cell_type == "code":
            cell.execution_count = None
    return notebook


def kinds(notebook: Any) -> list[list[str]]:
    """The kinds of outputs of each code cell."""
    return [
        sorted({key for each in cell["outputs"] for key in (each.get("data") or {each["output_type"]: ""})})
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["quantize_and_look", "search_and_compare"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_small(path: Path) -> None:
    import json

    assert path.stat().st_size < LARGEST
    shown = kinds(json.loads(path.read_text(encoding="utf-8")))
    assert ["image/png"] in shown
    assert sum(map(bool, shown)) >= 5
    assert not any("error" in each for each in shown)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    import json

    assert kinds(executed(path, tmp_path)) == kinds(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    import tempfile

    import nbformat

    for each in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as place:
            nbformat.write(executed(each, Path(place)), each)
