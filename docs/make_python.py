"""Writes the reference of the public names in ``docs/python.md`` from their docstrings: ``python docs/make_python.py``.

``tests/test_docs.py`` compares.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import saqcli

PAGE = Path(__file__).parent / "python.md"
BLOCK = re.compile(r"(<!-- reference -->\n).*?(<!-- end of reference -->\n)", re.DOTALL)
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Yields):$")
ITEM = re.compile(r"^([\w, *`.]+): (.*)$")
WIDTH = 100  # of a signature on one line


def reference() -> str:
    """The block of the page: every public name with its signature and docstring."""
    return "\n".join(line for name in sorted(saqcli.__all__, key=_order) for line in _entry(name))


def page() -> str:
    """The page with the reference as it is."""
    return BLOCK.sub(
        lambda match: match[1] + "\n" + reference() + "\n" + match[2], PAGE.read_text(encoding="utf-8")
    )


def _order(name: str) -> tuple[bool, str]:
    """Functions first, then classes."""
    return inspect.isclass(getattr(saqcli, name)), name


def _entry(name: str) -> Iterator[str]:
    value = getattr(saqcli, name)
    if name.startswith("__"):
        return
    yield from (f"### {name}", "", "```py", f"saqcli.{name}{_signature(value)}", "```", "")
    yield from _markdown(inspect.getdoc(value) or "")
    yield ""


def _signature(value: Any) -> str:
    """Names and defaults; types stand in the docstring and in the package."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    plain = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    text = str(inspect.Signature(plain))
    if len(text) <= WIDTH:
        return text
    return "(\n    " + ",\n    ".join(map(str, _with_star(plain))) + ",\n)"


def _with_star(parameters: list[inspect.Parameter]) -> Iterator[inspect.Parameter | str]:
    starred = False
    for each in parameters:
        if each.kind is each.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        yield each


def _markdown(text: str) -> Iterator[str]:
    """A docstring with its sections as lists and code."""
    section, open_item = "", ""
    for line in text.splitlines():
        found = SECTION.match(line)
        if found:
            if open_item:
                yield open_item
                open_item = ""
            section = found[1]
            yield from (f"**{section}**", "")
            if section == "Example":
                yield "```pycon"
            continue
        body = line.strip()
        if section == "Example":
            yield line[4:]
        elif section in ("Returns", "Yields"):
            yield body.replace("``", "`")
        elif (
            section
            and (item := ITEM.match(body))
            and line.startswith("    ")
            and not line.startswith("     ")
        ):
            if open_item:
                yield open_item
            open_item = f"- `{item[1]}`: {item[2]}".replace("``", "`")
        elif section and body:
            open_item = f"{open_item} {body.replace('``', '`')}"
        else:
            if open_item:
                yield open_item
                open_item = ""
            yield re.sub(r"``([^`]+)``", r"`\1`", line)
    if open_item:
        yield open_item
    if section == "Example":
        yield "```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
