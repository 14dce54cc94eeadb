"""Command-line options generated from the fields of ``saqcli.config``.

Help, bounds, default and parser of an option come from its field. ``with_settings`` adds the options of sections or of
single settings to a command, which receives the given values as a ``Given`` (``section.key`` to value). Other options,
such as ``--json``, are declared by the commands.
"""

import functools
import inspect
import re
import tomllib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

from saqcli.cli.completion import complete_model, complete_policy
from saqcli.config import (
    DEFAULT_RECIPE,
    DataSection,
    ModelSection,
    QuantizationSection,
    RunConfig,
    read_recipe,
)
from saqcli.errors import ConfigError, Problems
from saqcli.option import MODEL, Option
from saqcli.plugins import outside_names
from saqcli.serialization import parse_object

Section = TypeVar("Section", ModelSection, DataSection, QuantizationSection)

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        autocompletion=complete_model,
        help="Network: `resnet18` (timm first, then torchvision), `timm/NAME`, `torchvision/NAME` or `saq/NAME`; "
        "`NAME.TAG` for weights other than the default. `saq models` lists them. `MODULE:NAME` is a network of your "
        "own, such as `mypackage.nets:build`, imported from the current folder",
    ),
]
Builder = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:NAME",
        help="The network of your own that a run or file was made from; modules that files name are never imported",
        rich_help_panel=MODEL,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an unexpected error")]

# Settings for the images of a finished network, and for a float network.
IMAGES = (
    *("data.path", "data.split", "data.eval_batch_size", "data.workers", "data.bad_images"),
    *("data.class_order", "data.class_map", "data.exif_transpose"),
)
FLOAT_MODEL = (
    *("model.weights", "model.weights_key", "model.pretrained", "model.num_classes", "model.in_chans"),
    *("model.input_size", "model.mean", "model.std", "model.kwargs"),
)


COMPLETIONS: dict[str, Callable[[str], list[str]]] = {"quantization.policy": complete_policy}


@dataclass(frozen=True)
class Setting:
    """A field of the configuration with a command-line option.

    Attributes:
        path: ``section.key``.
        option: the ``Option`` in its annotation.
        kind: type of the value; ``str`` if the text is parsed.
        choices: accepted values with a remark on each; empty if any value is accepted.
        least: smallest number accepted by the command line.
        default: default as shown in the help; None if the help shows none.
    """

    path: str
    option: Option
    kind: type
    choices: dict[str, str]
    least: int | None
    default: str | None

    @property
    def flag(self) -> str:
        """Main name, with its dashes."""
        return f"--{_names(self.path, self.option)[0]}"

    @property
    def help(self) -> str:
        """Meaning, choices and default."""
        text = self.option.help.replace("{choices}", listed(self.choices))
        text += ". May be repeated" if self.option.repeated else ""
        return text if self.default is None else f"{text} [default: {self.default}]"

    def parameter(self) -> inspect.Parameter:
        """Typer's declaration of the option."""
        names = [f"--{name}" for name in _names(self.path, self.option)]
        if self.kind is bool and self.option.negative:
            names = [f"{name}/--no-{name[2:]}" for name in names]
        choices = list(self.choices)
        info = typer.Option(
            *names,
            metavar=None if self.kind is bool else self.option.metavar or "|".join(choices),
            help=self.help,
            rich_help_panel=self.option.panel,
            min=self.least,
            autocompletion=COMPLETIONS.get(self.path, (lambda: choices) if choices else None),
        )
        kind: Any = list[str] if self.option.repeated else self.kind
        return inspect.Parameter(
            self.path.replace(".", "__"),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, info],
        )

    def read(self, value: Any) -> Any:
        """The value of the setting from the value of Typer.

        Raises:
            ConfigError: the text is invalid.
        """
        if self.option.parse:
            return PARSERS[self.option.parse](value, self.path)
        return tuple(value) if self.option.repeated else str(value) if self.option.file else value


class Given(dict[str, Any]):
    """The given settings by ``section.key``; ``problems`` collects errors."""

    def __init__(self) -> None:
        super().__init__()
        self.problems = Problems()

    def path(self, key: str) -> Path | None:
        """The value of ``key`` as a path, or None."""
        return Path(self[key]) if key in self else None

    def model(self, name: str) -> ModelSection:
        """The ``model`` section for the network ``name``; errors are added to ``problems``."""
        return self._section(ModelSection, "model", {"name": name})

    def quantization(self) -> QuantizationSection:
        """The ``quantization`` section; errors are added to ``problems``."""
        return self._section(QuantizationSection, "quantization", {})

    def data(self, base: DataSection | None = None) -> DataSection:
        """The ``data`` section, with what is not given from ``base``; errors are added to ``problems``."""
        kept = {"path": self.get("data.path")} if base is None else base.model_dump()
        return self._section(DataSection, "data", kept)

    def _section(self, schema: type[Section], section: str, kept: dict[str, Any]) -> Section:
        settings = kept | {
            key.partition(".")[2]: value for key, value in self.items() if key.startswith(f"{section}.")
        }
        return self.problems.attempt(parse_object, schema, settings, "options") or schema(**kept)


def with_settings(
    *wanted: str | Setting, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add options for settings to a command, which receives a ``Given`` as ``given``.

    Args:
        wanted: paths of settings (``data.path``) or sections (``data``), or settings returned by ``adapted``.
        without: paths excluded from the sections.
    """
    chosen = [
        setting
        for one in wanted
        for setting in ([one] if isinstance(one, Setting) else _below(one))
        if setting.path not in without
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        made = {setting.path: setting.parameter() for setting in chosen}

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = Given()
            for setting in chosen:
                value = values.pop(made[setting.path].name)
                found = given.problems.attempt(setting.read, value) if value not in (None, []) else None
                if found is not None:
                    given[setting.path] = found
            command(given=given, **values)

        own = [each for each in inspect.signature(command).parameters.values() if each.name != "given"]
        own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        run.__signature__ = inspect.Signature([*made.values(), *own])  # type: ignore[attr-defined]
        return run

    return decorate


def adapted(path: str, *, default: str | None = None, **changes: Any) -> Setting:
    """A setting with another default or wording for one command; ``changes`` apply to its ``Option``."""
    setting = SETTINGS[path]
    return replace(
        setting,
        option=replace(setting.option, **changes),
        default=setting.default if default is None else default,
    )


def flag_of(path: str) -> str | None:
    """Main flag of the setting ``path``, such as ``--lr`` of ``training.lr``; None if it has no option."""
    return SETTINGS[path].flag if path in SETTINGS else None


def listed(choices: dict[str, str]) -> str:
    """Choices as text: ``saq, asaq (adaptive radius) or qat``."""
    texts = [f"{name} ({remark})" if remark else name for name, remark in choices.items()]
    return " or ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def _below(path: str) -> list[Setting]:
    return [setting for key, setting in SETTINGS.items() if key == path or key.startswith(f"{path}.")]


def _names(path: str, option: Option) -> tuple[str, ...]:
    return option.names or (path.rpartition(".")[2].replace("_", "-"),)


def _settings() -> Iterator[Setting]:
    """All settings with options, in the order of the configuration."""
    sections: dict[str, Any] = {"": RunConfig}
    sections |= {name: field.annotation for name, field in RunConfig.model_fields.items()}
    recipe = read_recipe(DEFAULT_RECIPE)
    for section, schema in sections.items():
        if not hasattr(schema, "panel"):
            continue
        quick = recipe.get(section, {})
        for key, annotation in get_type_hints(schema, include_extras=True).items():
            kind, notes = unwrapped(annotation)
            for option in (note for note in notes if isinstance(note, Option)):
                option = replace(option, panel=option.panel or schema.panel)
                value = quick.get(key, schema.model_fields[key].default)
                default = option.default or _shown(key, option, value)
                default = f"{default} (recipe {DEFAULT_RECIPE})" if key in quick else default
                yield Setting(f"{section}.{key}".lstrip("."), option, *_typed(option, kind, notes), default)


def unwrapped(annotation: Any) -> tuple[Any, list[Any]]:
    """The type without ``Annotated`` and ``None``, and its annotations."""
    notes: list[Any] = []
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            notes += more
        elif NoneType in get_args(annotation):
            annotation = get_args(annotation)[0]
        else:
            return annotation, notes


def _typed(option: Option, kind: Any, notes: list[Any]) -> tuple[type, dict[str, str], int | None]:
    """Type, choices and smallest number of an option."""
    choices = option.choices or dict.fromkeys(get_args(kind) if get_origin(kind) is Literal else (), "")
    if option.family:
        choices = {**choices, **dict.fromkeys(outside_names(option.family), "")}
    if option.file:
        return Path, {}, None
    if option.parse or kind not in (int, float, bool):
        return str, dict(choices), None
    bounds = [bound.ge for note in notes for bound in getattr(note, "metadata", ()) if hasattr(bound, "ge")]
    return kind, {}, bounds[0] if option.least is None and kind is int and bounds else option.least


def _shown(key: str, option: Option, value: Any) -> str | None:
    """A default as typed on the command line; None if there is none."""
    if value in (None, {}, ()) or not option.negative:
        return None
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{_names(key, option)[0]}"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_numbers(text: str, setting: str) -> tuple[float, ...]:
    """``0.5,0.5,0.5`` as numbers.

    Raises:
        ConfigError: the text is invalid.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"`{setting}={text}`: give numbers separated by commas, such as 0.485,0.456,0.406"
        ) from None


def parse_counts(text: str, setting: str) -> tuple[int, ...]:
    """``1,8`` as whole numbers of at least 1, in order, without duplicates.

    Raises:
        ConfigError: the text is invalid.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts):
        raise ConfigError(
            f"`{setting}={text}`: give whole numbers of at least 1 separated by commas, such as 1,8"
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_count_or_all(text: str, setting: str) -> int | str:
    """``500`` as a number of at least 1, or ``all``.

    Raises:
        ConfigError: the text is invalid.
    """
    if text == "all":
        return text
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text.strip()):
        raise ConfigError(f"`{setting}={text}`: give a number of at least 1, or all")
    return int(text)


def parse_size(text: str, setting: str = "model.input_size") -> int | tuple[int, ...]:
    """``224`` as one side, ``256x192`` as height and width.

    Raises:
        ConfigError: the text is invalid.
    """
    sides = text.strip().lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch("0*[1-9][0-9]{0,5}", side) for side in sides):
        raise ConfigError(
            f"`{setting}={text}`: give one side such as 224, or height and width such as 256x192"
        )
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def parse_assignments(text: str, setting: str) -> dict[str, Any]:
    """``a=1,b=same,c=[2,3]`` as a dictionary; values are numbers, booleans and lists if they parse as such.

    Raises:
        ConfigError: a pair without ``=``.
    """
    values: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", text):  # commas outside lists
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"`{setting}={text}`: give NAME=VALUE pairs separated by commas, such as pad_type=same"
            )
        values[key.strip()] = literal(value.strip())
    return values


def literal(text: str) -> Any:
    """A number, a boolean, a list or, if it is none of these, the text itself."""
    try:
        return tomllib.loads(f"value = {text.lower() if text.lower() in ('true', 'false') else text}")[
            "value"
        ]
    except (ValueError, RecursionError):  # not TOML, or nested too deeply
        return text


def parse_pins(texts: list[str], setting: str) -> dict[str, str]:
    """``PATTERN=BITS`` pairs as a dictionary, in order.

    Raises:
        ConfigError: a pair without ``=``.
    """
    pins = {}
    for text in texts:
        pattern, equals, bits = text.rpartition("=")
        if not equals or not pattern.strip():
            raise ConfigError(f"`{setting}={text}`: give PATTERN=BITS, such as 'layer4.*=8' or '*.conv1=3-6'")
        pins[pattern.strip()] = bits.strip()
    return pins


def parse_widths(text: str, setting: str) -> tuple[int, ...]:
    """``2,3,4`` as bit-widths.

    Raises:
        ConfigError: the text is invalid.
    """
    from saqcli.quant.bits import parse_candidates

    return parse_candidates(text, setting)


def parse_input_widths(text: str, setting: str) -> tuple[int, ...] | str:
    """Bit-widths, or one of the words that stand for some.

    Raises:
        ConfigError: the text is invalid.
    """
    return text if text in ("same", "tied") else parse_widths(text, setting)


PARSERS: dict[str, Callable[[Any, str], Any]] = {
    "numbers": parse_numbers,
    "size": parse_size,
    "widths": parse_widths,
    "input widths": parse_input_widths,
    "assignments": parse_assignments,
    "pins": parse_pins,
    "count or all": parse_count_or_all,
}
SETTINGS = {setting.path: setting for setting in _settings()}


def folder_of_bits(bits: str) -> str:
    """Bits or a budget as part of a folder name: ``w4a4`` for ``4``, ``50pct`` for ``50%``."""
    bits = "".join(bits.split()).lower().replace("%", "pct")
    return f"w{bits}a{bits}" if bits.isdigit() else bits


def folder_of_model(name: str) -> str:
    """A model's name as part of a folder name: ``mypackage.nets.build`` for ``mypackage.nets:build``."""
    return name.replace(":", ".")
