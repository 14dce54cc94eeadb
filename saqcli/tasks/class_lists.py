"""Readers of class files: class lists, and maps from folders to classes.

A class list (``data.class_order``, or a ``class_to_idx.json`` next to the folders) has one name per line, or is a JSON
list, or a JSON object of names and indices. A class map (``data.class_map``) gives the class of each folder: lines of
two words, CSV, or a JSON object. Reading is strict: the first error in a file refuses it.
"""

import csv
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from saqcli.errors import ConfigError
from saqcli.serialization import named_path, printable, read_json, read_text

# Usual names of such files: of torchvision's and Keras's users, timm's --class-map and annotation tools.
CLASS_LIST_NAMES = (
    *("class_to_idx.json", "class_to_idx.txt", "class_to_idx.csv", "class_indices.json", "idx_to_class.json"),
    *("classes.json", "classes.txt", "class_names.json", "class_names.txt", "class_map.txt"),
)
_SYNSET = re.compile(r"n\d{8}")
_HEADER = {"folder", "class", "name", "label", "index", "idx", "synset", "wnid", "class_name", "class_idx"}
_SHOWN = 60  # characters of a name in a message


def find_class_lists(places: Iterable[Path]) -> list[Path]:
    """The class lists in ``places``, in their order."""
    found = {place / name: None for place in places for name in CLASS_LIST_NAMES}
    return [path for path in found if path.is_file()]


def read_class_list(path: Path, folders: Collection[str]) -> dict[str, int]:
    """Read class names and their indices from ``path``.

    Args:
        path: ``.json``: a list of names, or an object of names and indices in either direction. Otherwise text: one
            name per line, or a name and its index in either order unless a whole line is the name of a folder.
        folders: names of class folders.

    Raises:
        ConfigError: the file does not exist, or its content is invalid.
    """
    text = _read(path)
    if path.suffix.lower() == ".json":
        pairs = _json_pairs(read_json(text, str(path)), path)
    else:
        lines = _lines(text, path)
        numbered = None if set(lines) & set(folders) else _numbered(lines)
        pairs = [(name, index) for index, name in enumerate(lines)] if numbered is None else numbered
    _check_unique([name for name, _ in pairs], "name", path)
    _check_unique([index for _, index in pairs], "index", path)
    if wrong := [name for name, index in pairs if index < 0]:
        raise ConfigError(f"{path}: the index of {_shown(wrong[0])} is below 0")
    if not pairs:
        raise ConfigError(f"{path} lists no classes: give one name per line, or a JSON list")
    return dict(pairs)


def read_class_map(path: Path, folders: Collection[str]) -> dict[str, str | int]:
    """Read the class of each folder from ``path``: an index, or the name or synset of a class.

    Args:
        path: ``.json``: an object. ``.csv``: two columns, with or without a header. Otherwise lines of a folder and a
            class, separated by a tab, a comma or a blank.
        folders: names of class folders, used to find the end of a name that contains blanks.

    Raises:
        ConfigError: the file does not exist, or its content is invalid.
    """
    text = _read(path)
    if path.suffix.lower() == ".json":
        tree = read_json(text, str(path))
        if not isinstance(tree, dict) or not all(type(value) in (str, int) for value in tree.values()):
            raise ConfigError(f'{path}: give a JSON object of folders and classes, {{"FOLDER": "CLASS"}}')
        pairs: list[tuple[str, str | int]] = list(tree.items())
    else:
        rows = [_split_line(line, number, path, folders) for number, line in enumerate(_lines(text, path), 1)]
        if rows and rows[0][0] not in folders and {word.lower() for word in rows[0]} <= _HEADER:
            del rows[0]
        pairs = [(folder, int(name) if _is_index(name) else name) for folder, name in rows]
    _check_unique([folder for folder, _ in pairs], "folder", path)
    if not pairs:
        raise ConfigError(f"{path} maps no folder: give a line `FOLDER CLASS` for each")
    if wrong := [folder for folder, name in pairs if name == "" or (isinstance(name, int) and name < 0)]:
        raise ConfigError(
            f"{path}: {_shown(wrong[0])} has no class: give a name, a synset or an index counted from 0"
        )
    return dict(pairs)


def _read(path: Path) -> str:
    if path.suffix.lower() in (".pkl", ".pickle", ".pt", ".pth"):
        raise ConfigError(f"{path} may hold code, which saq does not run: give a JSON or text file")
    return read_text(named_path(str(path)), str(path)).removeprefix("\ufeff")


def _lines(text: str, path: Path) -> list[str]:
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if "" in lines:
        raise ConfigError(f"{path}: line {lines.index('') + 1} is blank: give a class on every line")
    return lines


def _json_pairs(tree: Any, path: Path) -> list[tuple[str, int]]:
    if isinstance(tree, list) and all(isinstance(name, str) for name in tree):
        return [(name, index) for index, name in enumerate(tree)]
    if isinstance(tree, dict) and all(type(index) is int for index in tree.values()):
        return list(tree.items())
    if isinstance(tree, dict) and all(_is_index(key) and isinstance(name, str) for key, name in tree.items()):
        return [(name, int(index)) for index, name in tree.items()]
    raise ConfigError(f'{path}: give a JSON list of names, or an object of names and indices, {{"NAME": 0}}')


def _numbered(lines: list[str]) -> list[tuple[str, int]] | None:
    """Names and indices, counted from 0 or 1, if every line has both in the same order; a header is skipped."""
    for pattern in (r"(?P<name>.+?)[\s,;:=]+(?P<index>\d+)", r"(?P<index>\d+)[\s,;:=]+(?P<name>.+)"):
        found = [re.fullmatch(pattern, line) for line in lines]
        if len(found) > 1 and found[0] is None and set(re.split(r"[\s,;]+", lines[0].lower())) <= _HEADER:
            del found[0]
        if found and all(found):
            pairs = [(match["name"].strip("\"'"), int(match["index"])) for match in found if match]
            first = min(index for _, index in pairs)
            whole = {index for _, index in pairs} == set(range(first, first + len(pairs)))
            return [(name, index - 1) for name, index in pairs] if whole and first == 1 else pairs
    return None


def _split_line(line: str, number: int, path: Path, folders: Collection[str]) -> tuple[str, str]:
    """Folder and class from a line of a class map."""
    if "\t" in line:
        words = [word.strip() for word in line.split("\t")]
    elif "," in line or '"' in line:
        words = [word.strip() for word in next(csv.reader([line], skipinitialspace=True))]
        if len(words) != 2 and "," not in line:
            words = [word for word in next(csv.reader([line], delimiter=" ", skipinitialspace=True)) if word]
    else:
        words = line.split()
        if len(words) > 2:
            words = _split_at_blank(line, words, folders)
    if len(words) != 2 or "" in words:
        raise ConfigError(
            f"{path}: line {number} is not a folder and a class: put a tab or a comma between the two"
        )
    return words[0], words[1]


def _split_at_blank(line: str, words: list[str], folders: Collection[str]) -> list[str]:
    """Split three or more words: the folder is an existing one, or everything before a synset or an index."""
    splits = [[line[: match.start()], line[match.end() :]] for match in re.finditer(r"\s+", line)]
    there = [split for split in splits if split[0] in folders]
    if not there and (_SYNSET.fullmatch(words[-1]) or _is_index(words[-1])):
        there = [splits[-1]]
    return there[0] if len(there) == 1 else words


def _is_index(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", text) is not None


def _check_unique(values: list[Any], kind: str, path: Path) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ConfigError(f"{path}: the {kind} {_shown(twice[0])} appears twice")


def _shown(name: object) -> str:
    return printable(str(name), _SHOWN)


def mismatch(index: Mapping[str, int], count: int) -> str:
    """Why a class list does not match a network with ``count`` classes; empty if it does."""
    if len(index) != count:
        return f"it lists {len(index)} classes, the model has {count}"
    wrong = [name for name, place in index.items() if place >= count]
    return (
        f"the index of {_shown(wrong[0])} is {index[wrong[0]]}, the model has {count} classes"
        if wrong
        else ""
    )
