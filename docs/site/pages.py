"""What MkDocs does to the pages: the repository's own Markdown, as GitHub shows it, becomes a site.

pages of the repository outside docs/, their links     CHANGELOG.md and benchmarks/
links to files that are no pages                       their names, without a link
fences such as ``python run.py``                       a block with that title
fences ``math`` and inline formulas                    MathML, made here, so that no script is loaded
notebooks                                              Markdown, with the outputs that they hold
the word of a folder in the navigation                 the folder's pages
options in running text                                not broken at their hyphens
"""

import base64
import html
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
OUTSIDE = ("CHANGELOG.md", "benchmarks/README.md", "benchmarks/RESULTS.md")
LISTED = ("decisions", "notebooks")
STYLE = Path(__file__).parent / "site.css"

FENCE = re.compile(r"^( *)(```+)(\w*)([^\n]*)\n(.*?)^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$`([^`\n]+)`\$")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
MARK = "\0{}\0"
CODE = re.compile(r"<code>[^<\n]*</code>")
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The pages of a folder in the place of its name."""
    config.nav = _with_folders(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages outside ``docs/`` and the notebooks, with their pictures."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "assets/site.css", abs_src_path=str(STYLE)))
    for path in sorted((DOCS / "notebooks").glob("*.ipynb")):
        text, pictures = notebook(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page as Python-Markdown reads it."""
    kept: list[str] = []

    def keep(text: str) -> str:
        kept.append(text)
        return MARK.format(len(kept) - 1)

    text = FENCE.sub(lambda match: keep(_fence(match)), markdown)
    text = FORMULA.sub(
        lambda match: keep(f"<span>{convert(match[1])}</span>"), text
    )  # math alone would be a block
    source = page.file.src_uri
    text = LINK.sub(lambda match: _link(match, source, files), text)
    return re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], text)


def on_page_content(html: str, **_: Any) -> str:
    """Options in running text in one piece: browsers break lines behind hyphens."""
    return CODE.sub(lambda match: OPTION.sub(r"<span class=\"whole\">\g<0></span>", match[0]), html)


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    lines: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for output in cell["outputs"]:
            lines += _output(output, path.stem, pictures)
    return "\n".join(lines), pictures


def _output(output: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}-{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode("".join(data["image/png"]))
        yield from (f"![output of the cell above]({name})", "")
    elif text := "".join(output.get("text", data.get("text/plain", []))).rstrip():
        yield from ("```text", text, "```", "")


def _with_folders(nav: Any) -> Any:
    if isinstance(nav, dict):
        return {title: _with_folders(entry) for title, entry in nav.items()}
    if isinstance(nav, list):
        return [
            each for entry in nav for each in (_pages(entry) if entry in LISTED else [_with_folders(entry)])
        ]
    return _pages(nav) if nav in LISTED else nav


def _pages(folder: str) -> list[str]:
    found = sorted(path for path in (DOCS / folder).iterdir() if path.suffix in (".md", ".ipynb"))
    return [f"{folder}/{path.stem}.md" for path in found]


def _fence(match: re.Match[str]) -> str:
    indent, ticks, language, rest, body = match.groups()
    if language == "math":
        return convert(" ".join(body.split()), display="block")
    title = f' title="{html.escape(rest.strip())}"' if rest.strip() else ""
    return f"{indent}{ticks}{language}{title}\n{body}{indent}{ticks}"


def _link(match: re.Match[str], source: str, files: Files) -> str:
    picture, text, target = match.groups()
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    file, hash_, anchor = target.partition("#")
    # Where the file is in the repository, and where the site has it.
    folder = posixpath.dirname(source if source in OUTSIDE else f"docs/{source}")
    wanted = posixpath.normpath(posixpath.join(folder, file)).removeprefix("docs/")
    if files.get_file_from_path(wanted) is None:
        wanted = wanted.removesuffix(".ipynb") + ".md" if wanted.endswith(".ipynb") else wanted
        if files.get_file_from_path(wanted) is None:
            return match[0] if picture or not (ROOT / folder / file).exists() else text
    return f"{picture}[{text}]({posixpath.relpath(wanted, posixpath.dirname(source) or '.')}{hash_}{anchor})"
