"""The documentation site is built without a warning, has every page, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urldefrag

import pytest

import saqcli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LARGEST_PICTURE = 200_000  # bytes
LOADING = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    for needed in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(needed)
    made = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-q",
            "-f",
            "docs/site/mkdocs.yml",
            "-d",
            str(made),
        ],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return made


class Loads(HTMLParser):
    """What a page loads when it is opened, and the pages of this site that it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        target = given.get(LOADING.get(tag, ""), "") or ""
        if target and given.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(target)
        if tag == "a" and not re.match(r"[a-z]+:", given.get("href") or "#"):
            self.links.append(urldefrag(given.get("href") or "")[0])


@pytest.mark.timeout(300)
def test_every_page_is_built(site: Path) -> None:
    sources = [path.relative_to(DOCS) for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb")]
    sources += [Path("CHANGELOG.md"), Path("benchmarks/README.md"), Path("benchmarks/RESULTS.md")]
    built = {path.relative_to(site) for path in site.rglob("*.html")}
    names = {source.with_suffix(".html") for source in sources}
    assert not {name for name in names if name not in built and name.with_name("index.html") not in built}


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        if page.name == "404.html":  # its paths are those of a server's root
            continue
        seen = Loads(page)
        for target in seen.loaded:
            assert not re.match(r"(https?:)?//", target), f"{page.name} loads {target}"
            assert (page.parent / target.partition("?")[0]).is_file(), f"{page.name} lacks {target}"
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8")  # drawn by a script from elsewhere
        for link in filter(None, seen.links):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), (
            sheet.name
        )


def test_formulas_are_mathml(site: Path) -> None:
    for name in ("saq", "samq", "asga"):
        text = (site / "guides" / f"{name}.html").read_text(encoding="utf-8")
        assert text.count('display="block"') >= 2
        assert "```" not in text
        assert "$`" not in text


def test_programs_have_their_names(site: Path) -> None:
    text = (site / "targets.html").read_text(encoding="utf-8")
    assert 'class="filename">run_onnxruntime.py<' in text
    assert "```" not in text


def test_api_page_has_every_public_name(site: Path) -> None:
    page = (DOCS / "guides" / "api.md").read_text(encoding="utf-8").replace("api.info.bits_of", "bits")
    public = {name for name in saqcli.__all__ if not name.startswith("__")}
    assert set(re.findall(r"^::: saqcli\.(\w+)$", page, re.MULTILINE)) == public
    text = (site / "guides" / "api.html").read_text(encoding="utf-8").replace("api.info.bits_of", "bits")
    assert not [name for name in public if f'id="saqcli.{name}"' not in text]


def test_every_picture_is_small_and_shown() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in [*DOCS.rglob("*.md"), ROOT / "README.md"])
    pictures = [path for path in (DOCS / "images").iterdir() if path.suffix in (".png", ".svg")]
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < LARGEST_PICTURE, picture.name
        assert f"images/{picture.name})" in pages, picture.name
