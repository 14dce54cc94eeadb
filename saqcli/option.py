"""The command-line option of a setting, and the headings of options in the help."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

BITS, DATA, MODEL = "Bits", "Data", "Model"
TRAINING, EFFICIENCY, REGULARIZATION = "Training", "Training efficiency", "Regularization"
RECONSTRUCTION = "Reconstruction"
SEARCH, EXPORT, RUN, GENERAL = "Search", "Export", "Run", "General"


@dataclass(frozen=True)
class Option:
    """The command-line option of a setting, in addition to its type, bounds and default.

    Attributes:
        help: meaning; ``{choices}`` lists ``choices``. The default is appended. Settings in backticks, here
            and in ``default``, are shown as flags of the command.
        metavar: placeholder of the value; empty for booleans and literals, which need none.
        default: effect of a missing option, where the field's default (or that of recipe ``quick``) does not say it.
        panel: heading in the help; None for that of the section.
        names: names without dashes, the main one first; empty for the field's name in kebab case.
        choices: values and a remark on each, which may be empty; those of the tables of plugins, which a test compares.
        parse: reader of the text, by its name in ``saqcli.cli.options.PARSERS``; None for a plain value.
        least: smallest number accepted, where the type has no bound or another one.
        file: whether the value is a path, which shells complete.
        repeated: whether the option may be given several times.
        negative: whether a boolean has a negative name too.
        family: family of plugins (``saqcli.plugins``) whose further names are choices as well.
    """

    help: str
    metavar: str = ""
    default: str | None = None
    panel: str | None = None
    names: tuple[str, ...] = ()
    choices: Mapping[str, str] | None = None
    parse: (
        Literal["numbers", "size", "widths", "input widths", "assignments", "pins", "count or all"] | None
    ) = None
    least: int | None = None
    file: bool = False
    repeated: bool = False
    negative: bool = True
    family: str | None = None
