"""Translation of settings in messages to command-line flags.

Messages of the library name settings and arguments in backticks, as in Python: ```data.batch_size=8```,
```overwrite=True```, ```quantize(run_dir='runs/x', resume=True)```. The command line prints flags instead.
"""

import ast
import re
import shlex
from functools import cache
from typing import Any, NamedTuple

from saqcli.cli.options import flag_of
from saqcli.config import RunConfig

_CALL = re.compile(r"`([a-z]+\([^`]*\))`")
_TOKEN = re.compile(r"`([a-z_][\w.]*)(?:=([^`]*))?`")

SEARCH = {"quantization.bops": "--budget"}  # flags with another name in ``saq search``
# Settings without a flag in this command, to be given with --set.
HIDDEN = {"quantize": ("search.", "data.eval_"), "search": ("training.", "export.", "data.eval_")}

# Arguments of library functions other than settings.
ARGUMENTS = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        *("overwrite", "resume", "run_dir", "out", "recipe", "config", "nproc_per_node"),
        *("bits", "policy", "style", "against", "grid", "bench", "batch_sizes", "threads", "repeats"),
    )
} | {"model": "MODEL", "path": "--onnx", "runtimes": "--verify", "assignments": "--set"}
VERBS = {"evaluate": "eval"}  # functions whose command has another name


class Command(NamedTuple):
    """A command and its options."""

    verb: str
    options: frozenset[str]


_entered: list[Command] = []


def command_of(group: Any, verb: str) -> Command:
    """The command ``verb`` of ``group``, the Typer application as a group of commands."""
    parameters = group.commands[verb].params
    return Command(verb, frozenset(name for one in parameters for name in (*one.opts, *one.secondary_opts)))


def enter(context: Any) -> None:
    """Use the flags of the command that ``context`` invokes until the context is closed."""
    if context.invoked_subcommand in context.command.commands:
        _entered.append(command_of(context.command, context.invoked_subcommand))
        context.call_on_close(_entered.pop)


def as_flags(text: str, command: Command | None = None) -> str:
    """``text`` with flags in place of settings, arguments and calls in backticks.

    Args:
        text: a message of the library; unknown names in backticks are left unchanged.
        command: the running command; None is the entered one. Without any, every setting is assumed to have a flag.

    Example:
        >>> as_flags("is there: use `overwrite=True`, or a smaller `data.batch_size`; `data.bad_images=skip` skips")
        'is there: use --overwrite, or a smaller --batch-size; --bad-images skip skips'
    """
    command = command or (_entered[-1] if _entered else None)
    text = _CALL.sub(lambda found: _command_line(found[1], command) or found[0], text)
    return _TOKEN.sub(lambda found: _flag(found[1], found[2], command) or found[0], text)


def flags_in(value: Any) -> Any:
    """``value`` with flags in all strings of its lists and dictionaries; keys are unchanged."""
    if isinstance(value, dict):
        return {key: flags_in(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [flags_in(inner) for inner in value]
    return as_flags(value) if isinstance(value, str) else value


def _command_line(call: str, command: Command | None) -> str | None:
    """``quantize(run_dir='x')`` as `` `saq quantize --run-dir x` ``; None if ``call`` is not such a call."""
    try:
        tree = ast.parse(call, mode="eval").body
        assert isinstance(tree, ast.Call)
        assert isinstance(tree.func, ast.Name)
        words = ["saq", VERBS.get(tree.func.id, tree.func.id)]
        words += [shlex.quote(str(ast.literal_eval(argument))) for argument in tree.args]
        for keyword in tree.keywords:
            value = str(ast.literal_eval(keyword.value))
            word = _flag(
                str(keyword.arg), value if value in ("True", "False") else shlex.quote(value), command
            )
            assert word is not None
            words.append(word)
    except (SyntaxError, ValueError, AssertionError):
        return None
    return f"`{' '.join(words)}`"


def _flag(name: str, value: str | None, command: Command | None) -> str | None:
    """The flag of a setting or argument with its value; None if ``name`` is neither."""
    if name not in ARGUMENTS and ".".join(name.split(".")[:2]) not in _settings():
        return None
    option = ARGUMENTS.get(name) or _option(name, command)
    if option is None:
        return f"--set {name}" + ("" if value is None else f"={_plain(value)}")
    if not option.startswith("--"):
        return value or option
    if value in (None, "True"):
        return option
    if name == "export.styles" and value == "()":
        return "--no-export"
    if value == "False" and (command is None or option.replace("--", "--no-", 1) in command.options):
        return option.replace("--", "--no-", 1)
    if value == "False":
        return f"--set {name}=false"
    return f"{option} {_plain(str(value))}"


def _option(name: str, command: Command | None) -> str | None:
    """The option of a setting; None if the command accepts it only through --set."""
    option = "MODEL" if name == "model.name" else flag_of(name)
    if command is None or option is None:
        return option
    if command.verb == "search":
        option = SEARCH.get(name, option)
    if "--set" in command.options and (
        option not in {"MODEL", *command.options} or name.startswith(HIDDEN.get(command.verb, ()))
    ):
        return None
    return option


def _plain(value: str) -> str:
    """A Python value as typed on the command line: lists with commas, booleans in lower case."""
    if value in ("True", "False"):
        return value.lower()
    if value[:1] in ("(", "[") and value[-1:] in (")", "]"):
        return ",".join(part.strip(" '\"") for part in value[1:-1].split(",") if part.strip())
    return value


@cache
def _settings() -> frozenset[str]:
    """``section.key`` of every setting."""
    sections = RunConfig.model_fields.items()
    return frozenset(
        f"{name}.{key}" for name, field in sections for key in getattr(field.annotation, "model_fields", ())
    )
