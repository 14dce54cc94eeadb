"""In a browser, on a phone and on a screen, in both color schemes: nothing overflows, and all text can be read."""

from collections import Counter
from pathlib import Path

import pytest

from saqcli.report.page.page import write_page
from tests.support.browser import CHROMIUM, look_at
from tests.support.reported import make_runs

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open pages in")
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, of text of any size
SMALLEST = 8.5  # pixels


@pytest.fixture(scope="module")
def pages(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shown")
    make_runs(digits, folder)
    return {
        "quantized": folder / "run" / "report.html",
        "searched": folder / "search" / "report.html",
        "compared": write_page([folder / "run", folder / "search"], folder / "both.html"),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("name", ["quantized", "searched", "compared"])
def test_page_fits_and_can_be_read(pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    found = look_at(pages[name], width, dark=dark, clicks=[])

    assert (found["width"], found["dark"]) == (width, dark)
    assert found["scrollWidth"] <= width
    assert found["wide"] == []
    assert found["requests"] == []
    assert found["pictures"]
    assert all(wide > 10 and high > 10 for _, wide, high in found["pictures"])
    assert all(found["images"])
    assert len(found["texts"]) > 50
    assert [each for each in found["texts"] if each["contrast"] < LEAST_CONTRAST] == []
    assert min(each["size"] for each in found["texts"]) >= SMALLEST


def test_table_folds_and_unfolds(pages: dict[str, Path]) -> None:
    folded = look_at(pages["quantized"], 1400)

    assert "Show all 20 layers" in folded["text"]
    assert folded["hidden"] == 6


def test_page_is_whole_without_script(pages: dict[str, Path]) -> None:
    found = look_at(pages["quantized"], 390, script=False)

    assert (found["hidden"], found["buttons"]) == (0, 0)
    assert len(found["rows"]) == 20


def test_table_sorts(pages: dict[str, Path]) -> None:
    button = "table.layers th[data-column] button"
    rows = look_at(pages["quantized"], 1400)["rows"]
    once = look_at(pages["quantized"], 1400, clicks=[(button, 0)])["rows"]
    twice = look_at(pages["quantized"], 1400, clicks=[(button, 0), (button, 0)])["rows"]

    assert Counter(rows) == Counter(once) == Counter(twice)
    assert rows[0] == "conv1"
    assert set(once[:2]) == {"conv1", "linear"}  # they have 8 bits
    assert set(twice[-2:]) == {"conv1", "linear"}


def test_control_sees_overflow_and_faint_text(pages: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    faint = '<p style="width: 3000px; color: #ccc; background: #fff">faint</p><img src="missing.png" alt="x"></body>'
    bad.write_text(pages["searched"].read_text().replace("</body>", faint))

    found = look_at(bad, 390)

    assert found["scrollWidth"] >= 3000
    assert "P." in found["wide"]
    assert [each["text"] for each in found["texts"] if each["contrast"] < LEAST_CONTRAST] == ["faint"]
    assert 0 in found["images"]
