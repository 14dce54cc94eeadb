"""Writes the tree of files in ``docs/architecture.md`` from their docstrings: ``python docs/make_tree.py``.

``tests/test_docs.py`` compares.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parent / "architecture.md"
PACKAGE = Path(__file__).parents[1] / "saqcli"
BLOCK = re.compile(r"(<!-- tree -->\n).*?(<!-- end of tree -->\n)", re.DOTALL)
# From top to bottom, as imports point; tests/test_architecture.py holds the same order.
ROOMS = (
    *("cli", "pipelines", "api", "report", "verify", "analysis", "searchers", "reconstruction"),
    *("training", "export", "data", "runs", "models", "quant", "tasks"),
)
NAMES = 26  # columns


def tree() -> str:
    """The block of the page: base files, then one room after the other, each file with the head of its docstring."""
    lines = ["```", "saqcli/", *_files(PACKAGE, "")]
    for room in ROOMS:
        lines += ["", *_folder(PACKAGE / room, "")]
    return "\n".join([*lines, "```", ""])


def page() -> str:
    """The page with the tree as it is."""
    return BLOCK.sub(lambda match: match[1] + tree() + match[2], PAGE.read_text(encoding="utf-8"))


def _folder(folder: Path, indent: str) -> Iterator[str]:
    yield f"{indent}{folder.name + '/':{NAMES}}{_head(folder / '__init__.py')}"
    yield from _files(folder, indent + "  ")
    for inner in sorted(path for path in folder.iterdir() if (path / "__init__.py").is_file()):
        yield from _folder(inner, indent + "  ")


def _files(folder: Path, indent: str) -> Iterator[str]:
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            name = f"{indent}{path.name} "
            yield f"{name:{NAMES}}{_head(path)}"


def _head(path: Path) -> str:
    """The first line of a file's docstring, without its full stop and marks of code."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].replace("\n", " ").replace("``", "").rstrip(".")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
