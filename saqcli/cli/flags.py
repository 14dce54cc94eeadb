"""Translation of settings in messages to command-line flags.

Messages of the library name settings and arguments in backticks: ```data.batch_size=8```, ```overwrite=True```. They
name commands as calls, ```quantize(run_dir='runs/x', resume=True)```: a notation of ``saq quantize`` and its options,
not the signature of a Python function. The command line prints flags instead.

Only what the running command accepts becomes a flag: other names in backticks may be those of a library.
"""

import ast
import re
import shlex
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, get_origin

from saqcli.cli.options import SETTINGS, flag_of, unwrapped
from saqcli.config import RunConfig

_CALL = re.compile(r"`([a-z]+\([^`]*\))`")
_TOKEN = re.compile(r"`([a-z_][\w.]*)(?:=([^`]*))?`")
_TOKENS = re.compile(f"{_TOKEN.pattern}(?: {_TOKEN.pattern})*")

SEARCH = {"quantization.bops": "--budget"}  # flags with another name in ``saq search``
SWITCHES = {"overwrite", "resume", "bench", "measure"}  # arguments that are booleans

# Arguments of library functions other than settings.
ARGUMENTS = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        *(*SWITCHES, "run_dir", "out", "recipe", "config", "nproc_per_node", "builder", "memory_format"),
        *("bits", "policy", "style", "against", "grid", "batch_sizes", "threads", "repeats", "widths"),
    )
} | {"path": "--onnx", "runtimes": "--verify", "assignments": "--set"}
VERBS = {"evaluate": "eval"}  # functions whose command has another name
QUOTES = "''"  # an empty value in a shell
TORCHRUN = "--nproc-per-node"  # an option of torchrun, which may start any command


class Command(NamedTuple):
    """A command, its options and arguments, and the main flags of its settings by ``section.key``."""

    verb: str
    options: frozenset[str]
    settings: dict[str, str]


_entered: list[Command] = []


def command_of(verb: str, parameters: Sequence[Any]) -> Command:
    """The command ``verb`` with these parameters, as Typer made them."""
    named = {each.name.replace("__", "."): each.opts[0] for each in parameters}
    return Command(
        verb,
        frozenset(name for each in parameters for name in (*each.opts, *each.secondary_opts)),
        {path: SEARCH.get(path, flag) if verb == "search" else flag for path, flag in named.items()},
    )


def enter(context: Any) -> None:
    """Use the flags of the command that ``context`` invokes until the context is closed."""
    verb = context.invoked_subcommand
    if verb in context.command.commands:
        _entered.append(command_of(verb, context.command.commands[verb].params))
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
    text = _CALL.sub(lambda found: _command_line(found[1]) or found[0], text)
    return _TOKENS.sub(lambda found: _typed(found[0], command), text)


def flags_in(value: Any) -> Any:
    """``value`` with flags in all strings of its lists and dictionaries; keys are unchanged."""
    if isinstance(value, dict):
        return {key: flags_in(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [flags_in(inner) for inner in value]
    return as_flags(value) if isinstance(value, str) else value


def _command_line(call: str) -> str | None:
    """``quantize(run_dir='x')`` as `` `saq quantize --run-dir x` ``; None if ``call`` is not such a call."""
    try:
        tree = ast.parse(call, mode="eval").body
        assert isinstance(tree, ast.Call)
        assert isinstance(tree.func, ast.Name)
        words = [shlex.quote(str(ast.literal_eval(argument))) for argument in tree.args]
        program = "saq"
        for keyword in tree.keywords:
            value = str(ast.literal_eval(keyword.value))
            word = _flag(str(keyword.arg), value if value in ("True", "False") else shlex.quote(value), None)
            assert word is not None
            if word.startswith(TORCHRUN):
                program = f"torchrun {word} -m saqcli"
            else:
                words.append(word)
    except (SyntaxError, ValueError, AssertionError):
        return None
    return f"`{' '.join([program, VERBS.get(tree.func.id, tree.func.id), *words])}`"


def _typed(text: str, command: Command | None) -> str:
    """Names in backticks, separated by spaces, as typed.

    If the command does not accept one of them, settings with values become the command line of ``saq quantize`` or
    ``saq search``; a setting without a value is left unchanged.
    """
    tokens = list(_TOKEN.finditer(text))
    words = [_flag(found[1], found[2], command) for found in tokens]
    if None in words and any(found[2] is not None for found in tokens):
        elsewhere = [_flag(found[1], found[2], None) for found in tokens]
        if None not in elsewhere and any(found[1] not in ARGUMENTS for found in tokens):
            verb = "search" if any(found[1].startswith("search.") for found in tokens) else "quantize"
            return f"`saq {verb} {' '.join(map(str, elsewhere))}`"
    return " ".join(word or found[0] for word, found in zip(words, tokens, strict=True))


def _flag(name: str, value: str | None, command: Command | None) -> str | None:
    """The flag of a setting or argument with its value; None if ``name`` is neither, or not accepted."""
    if name in ARGUMENTS:
        flag = ARGUMENTS[name]
        if command is not None and flag not in {*command.options, TORCHRUN}:
            return None
        if name in SWITCHES:
            return None if value == "False" else flag
        return flag if value is None else f"{flag} {value or QUOTES}"
    kind = _kinds().get(".".join(name.split(".")[:2]))
    if kind is None:
        return None
    if name == "model.name":
        places = command is None or command.options & {"model", "source"}
        return (value or "MODEL") if places else None
    if name == "export.styles" and value == "()" and (command is None or "--no-export" in command.options):
        return "--no-export"
    option = flag_of(name) if command is None else command.settings.get(name)
    if option is not None and value is None:
        return option
    if option is not None and kind is bool:
        if value != "False":
            return option if value == "True" else f"{option} {value or QUOTES}"
        if SETTINGS[name].option.negative:
            return option.replace("--", "--no-", 1)
    elif option is not None:
        return f"{option} {(_listed(str(value)) if kind is tuple else value) or QUOTES}"
    if command is not None and ("--set" not in command.options or command.verb == "analyze"):
        return None  # --set of saq analyze is for instruments
    return f"--set {name}" if value is None else f"--set {_assigned(name, value, kind)}"


def _listed(value: str) -> str:
    """``(2, 3)`` as ``2,3``."""
    inner = value[1:-1] if value[:1] in ("(", "[") and value[-1:] in (")", "]") else value
    return ",".join(part.strip(" '\"") for part in inner.split(",") if part.strip())


def _assigned(name: str, value: str, kind: type) -> str:
    """``name=value``, with lists and booleans as in TOML."""
    if kind is tuple:
        items = value.strip("()[]").replace(" ", "").rstrip(",")
        return shlex.quote(f"{name}=[{items}]")
    boolean = value in ("True", "False") and kind in (bool, dict)
    return f"{name}={value.lower() if boolean else value}"


@cache
def _kinds() -> dict[str, type]:
    """The type of every setting by ``section.key``; ``dict`` for those with keys of their own."""
    found: dict[str, type] = {}
    for section, field in RunConfig.model_fields.items():
        for key, inner in getattr(field.annotation, "model_fields", {}).items():
            kind, _ = unwrapped(inner.annotation)
            found[f"{section}.{key}"] = get_origin(kind) or kind
    return found
