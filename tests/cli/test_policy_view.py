"""The bits of every layer as bars in a terminal: wide, narrow, and into a pipe."""

import io
from typing import Any

import pytest
from rich import console as rich_console

from saqcli.cli.screens import tables
from saqcli.cli.screens.tables import show_policy

LONG = "stages.3.blocks.11.some_very_long_attention_name.token_mixer.projection"
Tree = dict[str, dict[str, int | None]]


def layers_and_policy() -> tuple[list[dict[str, Any]], Tree]:
    policy: Tree = {
        "stem": {"weight": 8, "activation": 8},
        "layer1.0.conv1": {"weight": 3, "activation": 5},
        LONG: {"weight": 4, "activation": None},
        "[head]": {"weight": 8, "activation": 8},
    }
    macs = (10, 400, 200, 1)
    layers = [
        {
            "name": name,
            "kind": "Conv2d",
            "macs": count,
            "weight_bits": bits["weight"],
            "activation_bits": bits["activation"],
            "bops": count * (bits["weight"] or 32) * (bits["activation"] or 32),
            "pinned": name in ("stem", "[head]"),
            "group": name,
        }
        for (name, bits), count in zip(policy.items(), macs, strict=True)
    ]
    return layers, policy


def shown(
    monkeypatch: pytest.MonkeyPatch,
    width: int | None,
    what: tuple[list[dict[str, Any]], Tree] | None = None,
    **options: Any,
) -> str:
    """The output on a terminal of ``width`` columns, or into a pipe."""
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    file = io.StringIO()
    colours = {"color_system": "truecolor", "force_terminal": True, "width": width} if width else {}

    def console() -> rich_console.Console:
        return rich_console.Console(file=file, **colours)  # type: ignore[arg-type]

    monkeypatch.setattr(tables, "Console", console)
    layers, policy = layers_and_policy() if what is None else what
    show_policy(policy, layers, **options)
    return file.getvalue()


def plain(text: str) -> list[str]:
    from rich.text import Text

    return [line.rstrip() for line in Text.from_ansi(text).plain.splitlines()]


def test_pipe_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, None)
    lines = text.splitlines()

    assert "\x1b" not in text
    assert "colours" not in text
    assert lines[0].split() == ["layer", "weights", "inputs", "BOPs", "share"]
    assert lines[1].split() == ["stem", "(pinned)", "■■■■■■■■", "8", "■■■■■■■■", "8", "640", "2.0", "%"]
    assert lines[2].split() == ["layer1.0.conv1", "■■■", "3", "■■■■■", "5", "6", "K", "18.6", "%"]
    assert lines[3].split() == [LONG, "■■■■", "4", "float", "25.6", "K", "79.2", "%"]
    assert lines[4].startswith("[head] (pinned)")
    assert lines[-1] == "mean bits, weighted by MACs: weights 3.42, inputs 13.89"


@pytest.mark.parametrize("width", [80, 140])
def test_names_are_complete_at_every_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    head, *lines = plain(shown(monkeypatch, width))

    if width == 80:
        assert lines.pop(2) == LONG  # above its numbers
    else:
        assert lines[2].startswith(f"{LONG} ")
    rows = lines[:4]
    assert all(len(line) <= width for line in (head, *rows))
    names = ["stem (pinned)", "layer1.0.conv1", LONG if width == 140 else "", "[head] (pinned)"]
    assert [line.split("■")[0].rstrip() for line in rows] == names
    assert {line.index("■") for line in rows} == {head.index("weights")}
    assert len(lines) == 4 + 2
    assert lines[-1].endswith("colours by share of BOPs")


def test_widest_numbers_fit_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, policy = layers_and_policy()
    for layer in layers:
        layer["bops"] = 1_234_000_000

    _, *lines = plain(shown(monkeypatch, 80, (layers, policy), bops=1_234_000_000))
    lines.remove(LONG)

    assert all(line.endswith("1.234 G  100.0 %") and len(line) <= 80 for line in lines[:4])


def test_colour_encodes_share_and_pinned_is_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 140).splitlines()
    first, last = tables.COLOURS[0], tables.COLOURS[-1]

    def code(colour: str) -> str:
        return "38;2;" + ";".join(str(int(colour[k : k + 2], 16)) for k in (1, 3, 5))

    assert code(first) in lines[2]
    assert code(last) in lines[3]
    assert lines[1].startswith("\x1b[2m")
    assert not lines[2].startswith("\x1b[2m")


def test_share_is_of_the_given_total(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "10.0 %" in shown(monkeypatch, None, bops=256_000)


def test_empty_policy_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "layer" in shown(monkeypatch, None, ([], {}))
