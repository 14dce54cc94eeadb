"""Pages of runs: one self-contained HTML file, made from what is in the run directories."""

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from markupsafe import Markup, escape

from saqcli._version import __version__
from saqcli.errors import ConfigError, RunDirectoryError, SaqError
from saqcli.progress import Progress
from saqcli.report.page.compared import compared
from saqcli.report.page.contents import read_analysis, read_run
from saqcli.report.page.head import points
from saqcli.report.page.sections import analysis, sections
from saqcli.runs.directory import RunDirectory
from saqcli.serialization import json_text, make_folder, printable, write_text
from saqcli.units import format_duration, format_quantity

NAME, OF_SEVERAL = "report.html", Path("comparison.html")
TEMPLATES = Path(__file__).parent / "templates"
MARK = '<meta name="generator" content="saq '  # of our pages, which a new one may replace


def write_page(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of a run, or a page that compares several.

    Args:
        folders: run directories of finished runs; a single one may be a folder that ``saq analyze`` wrote.
        out: path of the page; None for ``report.html`` in the folder, of several runs for ``comparison.html``.

    Returns:
        The path of the page.

    Raises:
        ConfigError: ``out`` is another file, or the same run is given twice.
        RunDirectoryError: a folder is no finished run, or a file in it is damaged.
    """
    path = out or (folders[0] / NAME if len(folders) == 1 else OF_SEVERAL)
    _check_replaceable(path)
    text = page_of(folders)
    make_folder(path.parent)
    write_text(path, text)
    return path


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
    try:
        return _page_of(folders)
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
        AssertionError,
        TemplateError,
    ) as error:
        # files that were changed by hand
        named = ", ".join(map(str, folders))
        raise RunDirectoryError(
            f"no page can be made of {named}: its files hold figures that contradict each other "
            f"({printable(repr(error), 200)}); make the run again"
        ) from error


def _page_of(folders: Sequence[Path]) -> str:
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(
            "the same run is given twice: give different runs, or a single one for its own page"
        )
    if len(folders) > 1:
        return _rendered("compared.html.j2", compared([read_run(folder) for folder in folders]))
    folder = folders[0]
    if not (folder / "manifest.json").is_file() and (found := read_analysis(folder)) is not None:
        values = {"subject": found.subject, "analysis": analysis(found), "folder": str(folder)}
        return _rendered("analyzed.html.j2", values)
    return _rendered("page.html.j2", sections(read_run(folder)))


def page_after_analysis(source: Path, out: Path) -> Path:
    """The folder whose page shows the analysis in ``out``: the finished run that it is in, or ``out`` itself."""
    if out.parent.resolve() == source.resolve():
        try:
            if RunDirectory.open(source).manifest().status == "finished":
                return source
        except RunDirectoryError:
            pass
    return out


def _check_replaceable(path: Path) -> None:
    """Refuse to replace a file that is no page of ours.

    Raises:
        ConfigError: it is none, or ``path`` is a folder.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give the path of a file, such as {path / NAME}")
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            if MARK not in file.read(1000):
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
