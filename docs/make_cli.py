"""Writes ``docs/cli.md`` from the command line itself: ``python docs/make_cli.py``.

Read are the Typer objects in the signatures of the commands, not the help screen, so the text depends neither
on the width of a terminal nor on how a version of Typer prints. ``tests/test_docs.py`` compares.
"""

import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from types import NoneType
from typing import Any, NamedTuple

from typer.models import ArgumentInfo, OptionInfo, ParameterInfo

from saqcli.cli import app
from saqcli.cli.help import GENERAL, paragraphs, with_default
from saqcli.config import recipes

PAGE = Path(__file__).parent / "cli.md"
PLACEHOLDERS = {str: "TEXT", int: "INTEGER", float: "NUMBER"}

HEAD = """# The command line

<!-- Written by docs/make_cli.py: change the commands, then run `python docs/make_cli.py`. -->

`saq` and `python -m saqcli` are the same. Every command has `--help`.

The answer is printed on stdout, progress on stderr. With `--json`, stdout is one JSON object and there is no
progress; its keys are in [formats.md](formats.md#what---json-prints). An error is one line on stderr.

| exit code | meaning |
|--|--|
| 0 | done |
| 1 | an error that you can act on; the line says what was asked, what is true, what to do |
| 2 | wrong usage: no such command or option |
| 3 | an exported file does not equal the model, and nothing has its name; or a rerun is not the same |
| 4 | no bit configuration meets the budget; the line names the reachable range |
| 129, 130, 143 | interrupted by SIGHUP (a closed terminal), Ctrl-C or SIGTERM; the last line says how to resume |

A budget needs a unit: `34G`, `674.6M` or `500 KBOPs` of bit-operations; `5MB` or `4MiB` of bytes (`--size`); or `w4a4`,
what 4 bits in every free layer cost. What is missing or mistyped is told in one message, before anything is fetched or
loaded; after that come a run directory that is there already, the weights and the images.
"""


class Parameter(NamedTuple):
    """One argument or option of a command."""

    name: str
    annotation: Any
    info: ParameterInfo
    default: Any

    @property
    def is_flag(self) -> bool:
        """Takes no value."""
        return self.annotation is bool

    @property
    def declarations(self) -> list[str]:
        """``--bops`` and ``--budget``; ``--pretrained`` and ``--no-pretrained``."""
        first = self.info.default  # within Annotated, Typer takes the first name for a default
        given = [first] if isinstance(first, str) else []
        given += getattr(self.info, "param_decls", None) or ()
        given = given or [f"--{self.name.replace('_', '-')}"]
        return [name for declaration in given for name in declaration.split("/")]

    @property
    def placeholder(self) -> str:
        """What stands for the value."""
        if self.info.metavar:
            return str(self.info.metavar)
        return "PATH" if issubclass(self.annotation, PurePath) else PLACEHOLDERS[self.annotation]


def commands() -> dict[str, Callable[..., Any]]:
    """The function behind every command, by the command's name."""
    return {
        registered.name or "": registered.callback
        for registered in app.registered_commands
        if registered.callback is not None
    }


def parameters(command: Callable[..., Any]) -> Iterator[Parameter]:
    """The arguments and options of a command, in order."""
    hints = typing.get_type_hints(inspect.unwrap(command), include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind, info = typing.get_args(hints[name])[:2]
        kinds = [part for part in typing.get_args(kind) if part is not NoneType]
        plain = kinds[0] if kinds and NoneType in typing.get_args(kind) else kind
        element = typing.get_args(plain)[0] if typing.get_origin(plain) is list else plain
        yield Parameter(name, element, info, parameter.default)


def reference() -> str:
    """The text of ``docs/cli.md``."""
    sections = [_command(name, function) for name, function in commands().items()]
    names = ", ".join(f"`{name}`" for name in recipes())
    return "\n".join([HEAD, f"Recipes that come with the package: {names}.\n", *sections]).rstrip() + "\n"


def _command(name: str, function: Callable[..., Any]) -> str:
    found = list(parameters(function))
    arguments = [p for p in found if isinstance(p.info, ArgumentInfo)]
    usage = " ".join(["saq", name, *map(_argument, arguments), "[OPTIONS]"])
    lines = [f"## saq {name}", "", f"    {usage}", "", "\n\n".join(paragraphs(function.__doc__)), ""]
    if arguments:
        lines += ["| argument | meaning |", "|--|--|"]
        lines += [f"| `{_argument(p)}` | {_cell(p)} |" for p in arguments]
        lines += [""]
    for panel, options in _panels(found).items():
        lines += [f"| {panel} | meaning |", "|--|--|"]
        lines += [f"| {_spelling(p)} | {_cell(p)} |" for p in options]
        lines += [""]
    return "\n".join(lines)


def _argument(parameter: Parameter) -> str:
    required = parameter.default is inspect.Parameter.empty
    return parameter.placeholder if required else f"[{parameter.placeholder}]"


def _panels(found: list[Parameter]) -> dict[str, list[Parameter]]:
    panels: dict[str, list[Parameter]] = {}
    for parameter in found:
        if isinstance(parameter.info, OptionInfo):
            panels.setdefault(parameter.info.rich_help_panel or GENERAL, []).append(parameter)
    return {name: panels[name] for name in sorted(panels, key=lambda name: name == GENERAL)}


def _spelling(option: Parameter) -> str:
    value = "" if option.is_flag else option.placeholder
    return ", ".join(f"`{f'{name} {value}'.strip()}`".replace("|", "\\|") for name in option.declarations)


def _cell(parameter: Parameter) -> str:
    required = parameter.default is inspect.Parameter.empty and isinstance(parameter.info, OptionInfo)
    text = with_default(parameter.info.help or "", parameter.default, required=required)
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
