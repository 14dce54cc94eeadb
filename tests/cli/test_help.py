"""Help screens: text is printed unchanged at every width, and the defaults named are the defaults."""

import re
import shlex
from typing import Any

import pytest
from typer.main import get_command

from saqcli.cli import app
from saqcli.cli.help import PANELS, paragraphs
from saqcli.cli.options import SETTINGS
from saqcli.config import RunConfig
from saqcli.errors import SaqError
from saqcli.pipelines import quantize, search
from tests.support.command_line import saq

GROUP: Any = get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
NO_VALUE = {"all", "runs/NAME-BITS", "runs/NAME-BUDGET-SEARCHER"}  # words for values that cannot be typed
DEFAULT = re.compile(r"\[default: (\S+)( \(recipe quick\))?\]")
OPTIONS = [
    pytest.param(name, parameter, id=f"{name} {parameter.opts[0]}")
    for name in ("quantize", "search")
    for parameter in COMMANDS[name].params
    if (found := re.search(DEFAULT, parameter.help)) and found[1] not in NO_VALUE
    if "--in-chans" not in parameter.opts  # determined by the network if omitted
]


def screen(monkeypatch: pytest.MonkeyPatch, width: int, *command: str) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    result = saq(*command, "--help")
    assert result.exit_code == 0
    return str(result.stdout)


def contains(words: list[str], text: str) -> bool:
    """Whether the words of ``text`` occur in ``words`` in sequence, ignoring the final full stop."""
    *part, last = text.replace("`", "").split()
    starts = range(len(words) - len(part))
    return any(
        words[start : start + len(part)] == part and words[start + len(part)].rstrip(".") == last.rstrip(".")
        for start in starts
    )


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_word_is_printed_unchanged(monkeypatch: pytest.MonkeyPatch, name: str, width: int) -> None:
    text = screen(monkeypatch, width, name)
    words = text.split()

    assert "…" not in text
    for parameter in COMMANDS[name].params:
        assert contains(words, parameter.help), parameter.help
        names = {option for option in (*parameter.opts, *parameter.secondary_opts) if option.startswith("-")}
        assert names <= {word.strip(",") for word in words}
    for paragraph in COMMANDS[name].help.split("\n\n"):
        assert contains(words, paragraph)


@pytest.mark.parametrize("name", COMMANDS)
def test_fits_80_columns(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert max(map(len, screen(monkeypatch, 80, name).splitlines())) <= 80


def test_patterns_keep_their_asterisks(monkeypatch: pytest.MonkeyPatch) -> None:
    words = screen(monkeypatch, 80, "quantize").split()

    assert contains(words, "match a pattern: 'layer4.*=8', '*.conv1=3-6', 'fc=w8a4'. May be repeated")
    assert "'resnet50.*'" in screen(monkeypatch, 80, "models").split()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_shown_as_typed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    command = COMMANDS[name]
    shown = screen(monkeypatch, 80, name)

    for text in [command.help, *(parameter.help for parameter in command.params)]:
        assert all(" ".join(example.split()) in shown for example in re.findall("`([^`]+)`", text))


def test_examples_of_values_can_be_read() -> None:
    examples = [
        (setting, shlex.split(example)[0])
        for setting in SETTINGS.values()
        for example in re.findall("`([^`]+)`", setting.option.help)
    ]

    read = {
        example: setting.read([example] if setting.option.repeated else example)
        for setting, example in examples
    }

    assert read["layer4.*=8"] == {"layer4.*": "8"}
    assert read["*.conv1=3-6"] == {"*.conv1": "3-6"}
    assert read["256x192"] == (256, 192)
    assert read["pad_type=same,bn_eps=0.001"] == {"pad_type": "same", "bn_eps": 0.001}


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_commands_parse(name: str) -> None:
    for example in re.findall("^Example: `saq (.*)`", COMMANDS[name].help, re.MULTILINE):
        verb, *arguments = shlex.split(example)
        COMMANDS[verb].make_context(verb, arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_panels_stand_in_one_order(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    headings = [line for line in screen(monkeypatch, 80, name).splitlines() if line in PANELS]

    assert headings == sorted(headings, key=PANELS.index)
    assert headings[-1] == PANELS[-1]


def test_examples_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = screen(monkeypatch, 80, "eval").splitlines()

    assert "Example: saq eval runs/resnet18-w4a4 --bench --batch-sizes 1,8 --threads 1,2" in lines
    assert "Example: saq models 'timm/mobilenetv3*'" in screen(monkeypatch, 80, "models").splitlines()


def test_program_lists_its_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = screen(monkeypatch, 80).splitlines()

    assert [line.split()[0] for line in lines if re.match(r"  [a-z]", line)] == list(COMMANDS)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_summary_is_the_first_paragraph(name: str) -> None:
    assert GROUP.summaries[name] == paragraphs(COMMANDS[name].help)[0].rstrip(".")


def test_help_names_flags_of_its_command() -> None:
    helps = {(name, each.name): each.help for name in COMMANDS for each in COMMANDS[name].params}

    assert helps["quantize", "quantization__size"].endswith("together with --bops")
    assert helps["search", "quantization__size"].endswith("together with --budget")
    assert "else --no-exif-transpose, as" in helps["eval", "data__exif_transpose"]
    settings = [text for text in helps.values() if re.search(r"`(model|data|quantization|training)\.", text)]
    assert settings == [helps["quantize", "assign"], helps["search", "assign"]]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert re.match(r"[A-Zct]", parameter.help), (parameter.opts, parameter.help)
        assert len(parameter.help.split()) > 1
        assert not parameter.help.startswith(("Of ", "From "))
        assert getattr(parameter, "is_flag", False) or parameter.metavar, parameter.opts


@pytest.mark.parametrize(("name", "parameter"), OPTIONS)
def test_documented_default_is_the_default(
    monkeypatch: pytest.MonkeyPatch, name: str, parameter: Any
) -> None:
    """Passing the default named in the help changes nothing."""
    found: list[RunConfig] = []

    def take(config: RunConfig, *_: object, **__: object) -> None:
        found.append(config)
        raise SaqError("enough")

    monkeypatch.setattr(quantize, "quantize", take)
    monkeypatch.setattr(search, "search", take)
    default = DEFAULT.search(parameter.help)
    assert default
    budget = ("--bops", "w4a4") if name == "search" else ("--bits", "4")
    budget += ("--reconstruct",) if "--iterations" in parameter.opts else ()  # without it, that is an error
    given = [default[1]] if default[1].startswith("--") else [parameter.opts[0], default[1]]

    for more in ([], given):
        saq(name, "saq/resnet20", *budget, *more)

    assert len(found) == 2
    assert found[0] == found[1]
