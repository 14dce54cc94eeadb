"""What ``--help`` prints: every name, example and default as it is typed, however narrow the terminal.

Typer's own screen reads help as Markdown, which takes the asterisks of ``'layer4.*=8'``, and cuts what does not fit its
columns. Here a line is broken between words alone, and a name that is too long for its column gets a line of its own.
"""

import inspect
import os
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

NAMES = 26  # columns for the names of options, the gap behind them not included
WIDEST = 110  # longer lines are hard to read
STACKED = 60  # columns below which help stands under the names
GENERAL = "General"  # heading of the options without a panel, last

Row = tuple[str, str]  # names, and what they mean


class HelpCommand(TyperCommand):
    """A command with this help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the command."""
        formatter.write(_screen(self, ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What may stand behind the name of the command."""
        return [*(_argument(each) for each in self.get_params(ctx) if _is_argument(each)), "[OPTIONS]"]


class HelpGroup(TyperGroup):
    """The program with this help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the program."""
        formatter.write(_screen(self, ctx))


def plain(text: str) -> str:
    """Help without its backticks; spaces within them are kept together."""
    parts = text.split("`")
    return "".join(part.replace(" ", "\N{NO-BREAK SPACE}") if i % 2 else part for i, part in enumerate(parts))


def paragraphs(text: str | None) -> list[str]:
    """Of a docstring, each as one line."""
    return [" ".join(block.split()) for block in inspect.cleandoc(text or "").split("\n\n") if block.strip()]


def with_default(text: str, default: object, *, required: bool = False) -> str:
    """``text`` and what holds where an option is not given; options without a value of their own say so themselves."""
    if required:
        return f"{text.rstrip('.')} [required]"
    if isinstance(default, bool) or not isinstance(default, str | int | float | PurePath):
        return text
    shown = default.as_posix() if isinstance(default, PurePath) else str(default)
    return f"{text.rstrip('.')} [default: {shown}]"


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
    """With colour where people want it; Typer takes it out of what goes into a file."""
    return text if "NO_COLOR" in os.environ else typer.style(text, **style)


def _sections(command: Any, ctx: Any) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {"Arguments": [], "Commands": []}
    for name in getattr(command, "commands", {}):
        found["Commands"].append((name, paragraphs(command.commands[name].help)[0].rstrip(".")))
    general: list[Row] = []
    for parameter in command.get_params(ctx):
        if getattr(parameter, "hidden", False):
            continue
        help_text = parameter.help or ""
        if _is_argument(parameter):
            found["Arguments"].append((_argument(parameter), help_text))
            continue
        panel = getattr(parameter, "rich_help_panel", None)
        text = with_default(help_text, parameter.default, required=parameter.required)
        (found.setdefault(panel, []) if panel else general).append((_option(parameter), text))
    return {heading: rows for heading, rows in (found | {GENERAL: general}).items() if rows}


def _is_argument(parameter: Any) -> bool:
    return str(parameter.param_type_name) == "argument"


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return str(name) if parameter.required else f"[{name}]"


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
