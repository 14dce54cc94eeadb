"""The screens of ``--help``, without Markdown and without truncation.

Typer's screen reads help as Markdown, which drops the asterisks of ``'layer4.*=8'``, and truncates long names. Here
lines break between words only, and a name that is too long for its column is printed on a separate line.
"""

import inspect
import os
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from saqcli.option import (
    BITS,
    DATA,
    EFFICIENCY,
    EXPORT,
    GENERAL,
    MODEL,
    RECONSTRUCTION,
    REGULARIZATION,
    RUN,
    SEARCH,
    TRAINING,
)

NAMES = 26  # columns for option names, without the gap
WIDEST = 110  # longest line
STACKED = 60  # width below which help is printed under the names
INSTRUMENTS, MEASURING, SPEED, FILES = "Instruments", "Measurement", "Speed", "Files"
PANELS = (  # headings, the most used first
    *(INSTRUMENTS, MEASURING, BITS, DATA, MODEL, RECONSTRUCTION, TRAINING, EFFICIENCY, REGULARIZATION),
    *(SEARCH, SPEED),
    *(EXPORT, FILES, RUN, GENERAL),
)

Row = tuple[str, str]  # names and help


class HelpCommand(TyperCommand):
    """A command with this help screen."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the command."""
        formatter.write(_screen(self, ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The arguments shown after the name of the command."""
        return [*(argument(each) for each in self.get_params(ctx) if is_argument(each)), "[OPTIONS]"]


class HelpGroup(TyperGroup):
    """The program with this help screen, and a line on each of its commands."""

    summaries: ClassVar[dict[str, str]] = {}

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the program."""
        formatter.write(_screen(self, ctx))


def plain(text: str) -> str:
    """Help without backticks; spaces inside them become no-break spaces."""
    parts = text.split("`")
    return "".join(part.replace(" ", "\N{NO-BREAK SPACE}") if i % 2 else part for i, part in enumerate(parts))


def paragraphs(text: str | None) -> list[str]:
    """The paragraphs of a docstring, each as one line."""
    return [" ".join(block.split()) for block in inspect.cleandoc(text or "").split("\n\n") if block.strip()]


def is_argument(parameter: Any) -> bool:
    """Whether the parameter is positional."""
    return str(parameter.param_type_name) == "argument"


def argument(parameter: Any) -> str:
    """``RUN``, or ``[MODEL]`` if it is optional."""
    name = parameter.metavar or parameter.name.upper()
    return str(name) if parameter.required else f"[{name}]"


def meaning(parameter: Any) -> str:
    """Help of a parameter with its default, unless the help includes it."""
    text, default = str(parameter.help or ""), parameter.default
    if parameter.required and not is_argument(parameter):
        return f"{text} [required]"
    if isinstance(default, bool) or not isinstance(default, str | int | float | PurePath):
        return text
    return f"{text} [default: {default.as_posix() if isinstance(default, PurePath) else default}]"


def panels(parameters: Iterable[Any]) -> dict[str, list[Any]]:
    """Options by heading, in the order of ``PANELS``, without hidden ones."""
    found: dict[str, list[Any]] = {panel: [] for panel in PANELS}
    for parameter in parameters:
        if not is_argument(parameter) and not parameter.hidden:
            found.setdefault(parameter.rich_help_panel or GENERAL, []).append(parameter)
    return {panel: options for panel, options in found.items() if options}


def _screen(command: Any, ctx: Any) -> str:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    lines = list(_wrapped(command.get_usage(ctx), width, "", " " * 4))
    for text in paragraphs(command.help):
        if text.startswith("Example:"):
            lines += ["", f"Example: {text.partition('`')[2].rstrip('`')}"]  # on one line, to be copied
        else:
            lines += ["", *_wrapped(text, width)]
    for heading, rows in _sections(command, ctx).items():
        lines += ["", _styled(heading, bold=True)]
        for names, text in rows:
            lines += _row(names, text, width)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ") + "\n"


def _styled(text: str, **style: Any) -> str:
    """``text`` with color unless ``NO_COLOR`` is set; Typer removes it if stdout is not a terminal."""
    return text if "NO_COLOR" in os.environ else typer.style(text, **style)


def _sections(command: Any, ctx: Any) -> dict[str, list[Row]]:
    parameters = command.get_params(ctx)
    found = {
        "Arguments": [(argument(each), meaning(each)) for each in parameters if is_argument(each)],
        "Commands": list(getattr(command, "summaries", {}).items()),
    }
    for panel, options in panels(parameters).items():
        found[panel] = [(_option(each), meaning(each)) for each in options]
    return {heading: rows for heading, rows in found.items() if rows}


def _option(parameter: Any) -> str:
    names = ", ".join(sorted(parameter.opts, key=lambda name: not name.startswith("--")))
    if parameter.secondary_opts:
        names += f" / {', '.join(parameter.secondary_opts)}"
    return names if parameter.is_flag else f"{names} {parameter.metavar or 'VALUE'}"


def _row(names: str, text: str, width: int) -> Iterator[str]:
    indent = 6 if width < STACKED else 2 + NAMES + 2
    lines = list(_wrapped(text, width, " " * indent))
    if lines and len(names) + 4 <= indent:
        shown = _styled(names, fg=typer.colors.CYAN) + " " * (indent - 2 - len(names))
        lines[0] = f"  {shown}{lines[0].lstrip()}"
        yield from lines
        return
    yield "  " + _styled(names, fg=typer.colors.CYAN)
    yield from lines


def _wrapped(text: str, width: int, indent: str = "", more: str = "") -> list[str]:
    return textwrap.wrap(
        plain(text),
        width,
        initial_indent=indent,
        subsequent_indent=indent + more,
        break_long_words=False,
        break_on_hyphens=False,
    )
