"""Writes ``docs/cli.md`` from the command line itself: ``python docs/make_cli.py``.

It reads the commands, not the help screen: the text depends neither on the width of a terminal nor on how a version of
Typer prints. ``tests/test_docs.py`` checks that the page is current.
"""

from pathlib import Path
from typing import Any

from typer.main import get_command

from saqcli.cli import app
from saqcli.cli.help import argument, is_argument, meaning, panels, paragraphs
from saqcli.config import recipes

PAGE = Path(__file__).parent / "cli.md"

HEAD = """# The command line

<!-- Written by docs/make_cli.py: change the commands, then run `python docs/make_cli.py`. -->

`saq` and `python -m saqcli` are the same. Every command has `--help`.

Results are printed on stdout, progress on stderr. With `--json`, stdout holds one JSON object and no progress is shown;
[formats.md](formats.md#what---json-prints) lists its keys. An error is one line on stderr.

| exit code | meaning |
|--|--|
| 0 | done |
| 1 | an error that you can fix; the message names the request, the cause and the remedy |
| 2 | wrong usage: no such command or option |
| 3 | an exported file differs from the model and was not written; or a rerun differs from its run |
| 4 | no bit configuration meets the budget; the message names the reachable range |
| 129, 130, 143 | interrupted by SIGHUP (a closed terminal), Ctrl-C or SIGTERM; the last line says how to resume |

A budget needs a unit or an exponent: `34G`, `674.6M`, `500 KBOPs` or `5e8` of bit-operations; `5MB` or `4MiB` of bytes
(`--size`); `w4a4` for the cost of 4 bits in every layer that is not pinned; or `50%` of the cost of 8 bits in every
layer, rounded down. All missing and invalid options are reported in one message, before anything is downloaded or
loaded; existing run directories, weights and images are checked after that.

Options override the recipe, `--config` and `--set`. Defaults are those of recipe `quick`.
"""


def reference() -> str:
    """The text of ``docs/cli.md``."""
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    sections = [_command(name, command) for name, command in commands.items()]
    names = ", ".join(f"`{name}`" for name in recipes())
    return "\n".join([HEAD, f"Recipes that come with the package: {names}.\n", *sections]).rstrip() + "\n"


def _command(name: str, command: Any) -> str:
    arguments = [each for each in command.params if is_argument(each)]
    usage = " ".join(["saq", name, *map(argument, arguments), "[OPTIONS]"])
    lines = [f"## saq {name}", "", f"    {usage}", "", "\n\n".join(paragraphs(command.help)), ""]
    if arguments:
        lines += _table("argument", [(f"`{argument(each)}`", meaning(each)) for each in arguments])
    for panel, options in panels(command.params).items():
        lines += _table(panel, [(_spelling(each), meaning(each)) for each in options])
    return "\n".join(lines)


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {title} | meaning |", "|--|--|", *(f"| {' | '.join(row)} |" for row in cells), ""]


def _spelling(option: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    return ", ".join(f"`{name}`" if option.is_flag else f"`{name} {option.metavar}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
