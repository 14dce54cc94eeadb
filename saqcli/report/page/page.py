"""Pages of runs: one self-contained HTML file and its Markdown twin, made from what is in the run directories."""

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from markupsafe import Markup, escape

from saqcli._version import __version__
from saqcli.errors import ConfigError, RunDirectoryError, SaqError
from saqcli.progress import Progress
from saqcli.report.page import markdown
from saqcli.report.page.compared import compared
from saqcli.report.page.contents import Contents, read_analysis, read_run
from saqcli.report.page.head import points
from saqcli.report.page.sections import analysis, sections
from saqcli.runs.directory import RunDirectory
from saqcli.serialization import json_text, make_folder, printable, write_text
from saqcli.units import format_duration, format_quantity

NAME, OF_SEVERAL = "report.html", Path("comparison.html")
TEMPLATES = Path(__file__).parent / "templates"
MARK = '<meta name="generator" content="saq '  # of our pages, which a new one may replace


def write_page(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of a run, or a page that compares several, and its Markdown twin beside it.

    Args:
        folders: run directories of finished runs; a single one may be a folder that ``saq analyze`` wrote.
        out: path of the page; None for ``report.html`` in the folder, of several runs for ``comparison.html``.

    Returns:
        The path of the page.

    Raises:
        ConfigError: ``out`` or its twin is another file, or the same run is given twice.
        RunDirectoryError: a folder is no finished run, or a file in it is damaged.
    """
    path = out or (folders[0] / NAME if len(folders) == 1 else OF_SEVERAL)
    twin = twin_of(path)
    _check_replaceable(path, MARK)
    with _contradictions(folders):
        report = _read(folders)
        text = report.html()
        # that of a quantization is part of the run
        own = (
            path.resolve() == (folders[0] / NAME).resolve()
            and report.run is not None
            and report.run.quantized is not None
        )
        plain = None if own else report.markdown()
    make_folder(path.parent)
    if plain is not None:
        _check_replaceable(twin, markdown.MARK)
        write_text(twin, markdown.marked(plain))
    write_text(path, text)
    return path


def twin_of(path: Path) -> Path:
    """The Markdown file beside a page.

    Raises:
        ConfigError: the page itself has that name.
    """
    twin = path.with_suffix(".md")
    if twin == path:
        raise ConfigError(
            f"{path} is for the page as Markdown, which is written too: end the name with .html"
        )
    return twin


def try_page(folder: Path, progress: Progress) -> bool:
    """Write the page of a finished run; a run does not fail because a file that its page shows is damaged."""
    try:
        write_page([folder])
    except SaqError as error:
        progress.note(f"{NAME} was not written: {error}")
        return False
    return True


def page_of(folders: Sequence[Path]) -> str:
    """The text of the page; arguments and errors as for ``write_page``."""
    with _contradictions(folders):
        return _read(folders).html()


@contextmanager
def _contradictions(folders: Sequence[Path]) -> Iterator[None]:
    """Name the folders where a page cannot be made of their figures, which were changed by hand."""
    try:
        yield
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
        AssertionError,
        TemplateError,
    ) as error:
        named = ", ".join(map(str, folders))
        raise RunDirectoryError(
            f"no page can be made of {named}: its files hold figures that contradict each other "
            f"({printable(repr(error), 200)}); make the run again"
        ) from error


@dataclass(frozen=True)
class _Report:
    """What a page is made of: its template, the values in it, and the run if it is of one."""

    template: str
    values: dict[str, Any]
    run: Contents | None = None

    def html(self) -> str:
        """The page."""
        return _rendered(self.template, self.values)

    def markdown(self) -> str:
        """Its twin."""
        if self.run is not None:
            return markdown.of_run(self.run, self.values)
        if "analysis" in self.values:
            return markdown.of_analysis(self.values)
        return markdown.of_several(self.values)


def _read(folders: Sequence[Path]) -> _Report:
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(
            "the same run is given twice: give different runs, or a single one for its own page"
        )
    if len(folders) > 1:
        return _Report("compared.html.j2", compared([read_run(folder) for folder in folders]))
    folder = folders[0]
    if not (folder / "manifest.json").is_file() and (found := read_analysis(folder)) is not None:
        values = {"subject": found.subject, "analysis": analysis(found), "folder": str(folder)}
        return _Report("analyzed.html.j2", values)
    run = read_run(folder)
    return _Report("page.html.j2", sections(run), run)


def page_after_analysis(source: Path, out: Path) -> Path:
    """The folder whose page shows the analysis in ``out``: the finished run that it is in, or ``out`` itself."""
    if out.parent.resolve() == source.resolve():
        try:
            if RunDirectory.open(source).manifest().status == "finished":
                return source
        except RunDirectoryError:
            pass
    return out


def _check_replaceable(path: Path, mark: str) -> None:
    """Refuse to replace a file that is not ours, which ``mark`` tells.

    Raises:
        ConfigError: it is none of ours, or ``path`` is a folder.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give the path of a file, such as {path / NAME}")
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            if mark not in file.read(1000):
                raise ConfigError(f"{path} exists and is no page that saq wrote: give another path")


def _rendered(template: str, values: dict[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda value: "" if value is None else f"{value:.2f} %",
        "share": _share,
        "whole": lambda value: f"{100 * value:.0f} %",
        "points": points,
        "quantity": lambda value: "" if value is None else format_quantity(value),
        "bytes": lambda value: "" if value is None else format_quantity(value, "B"),
        "duration": lambda value: "" if value is None else format_duration(value),
        "figure": _figure,
        "code": _code,
        "tight": lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%"),
        "sentence": lambda text: f"{text[:1].upper()}{text[1:]}.",
        "literal": lambda text: json_text(text, ensure_ascii=False),
        "quoted": shlex.quote,
    }
    return environment.get_template(template).render(saq=__version__, **values)


def _figure(value: float | None) -> str:
    """Three significant digits; two below a hundredth."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.{3 if abs(value) >= 0.01 else 2}g}".replace("-", "\N{MINUS SIGN}")


def _code(text: str) -> Markup:
    """Escaped text, with settings between backticks set as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _share(value: float) -> str:
    """A share in percent with one decimal place."""
    return f"{100 * value:.1f} %" if value == 0 or value >= 0.0005 else "<0.1 %"
