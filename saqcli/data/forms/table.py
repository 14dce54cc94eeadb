"""A flat folder of images with a table of labels: a CSV or TSV of file names and classes, header or none."""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from saqcli.data.folders import IMAGE_EXTENSIONS, is_image
from saqcli.data.forms.labelled import SYNONYMS, Labelled, names_of, no_split, numbered
from saqcli.errors import DataError
from saqcli.serialization import printable, read_text
from saqcli.units import counted

SUFFIXES = (".csv", ".tsv")
NAMES = ("labels", "metadata", "annotations")  # of tables beside images
IMAGE_FOLDERS = ("images", "imgs", "img")
LARGEST_TABLE = 2**28  # bytes
FILE_COLUMNS = tuple("filename file_name file image path filepath image_path image_name id image_id".split())
LABEL_COLUMNS = ("label", "class", "category", "target", "class_name", "label_name", "breed", "species")
SPLIT_COLUMNS = ("split", "subset", "set")


@dataclass(frozen=True)
class TableFiles:
    """Image files named in a table.

    Attributes:
        files: their paths.
        names: as in the table.
        labels: of each.
    """

    files: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> tuple[str, int]:
        return self.files[index], self.labels[index]

    def lines(self) -> Iterator[str]:
        """What identifies the images, a line for each."""
        for name, label in zip(self.names, self.labels, strict=True):
            yield f"{name}\0{label}"


def find_table(data: Path, split: str) -> Path | None:
    """The table of a split: ``data`` itself, one beside images, or one with the split's name."""
    if data.is_file():
        return data if data.suffix.lower() in SUFFIXES else None
    if not data.is_dir():
        return None
    for name in names_of(split):
        folder = data / name
        if folder.is_dir():
            return _beside_images(folder, (*NAMES, name))
        for suffix in SUFFIXES:
            if (path := data / f"{name}{suffix}").is_file():
                return path
    return _beside_images(data, NAMES)


def _beside_images(folder: Path, names: Sequence[str]) -> Path | None:
    """The table in a folder whose images are in no class folders."""
    paths = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    table = next((path for path in paths if path.is_file()), None)
    if table is None:
        return None
    with os.scandir(folder) as entries:
        seen = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    flat = any(is_image(name) for name, is_folder in seen if not is_folder)
    folders = [name for name, is_folder in seen if is_folder]
    return table if flat or all(name in IMAGE_FOLDERS for name in folders) else None


def open_table(path: Path, split: str, *, root: Path | None = None, dead_images: bool = False) -> Labelled:
    """The images of one split.

    Args:
        path: the table.
        split: name of the split.
        root: the data folder, which names must not lead out of; None for the folder of the table.
        dead_images: whether files may be missing.

    Raises:
        DataError: the table is no table of files and labels, names missing files or others than of ``root``, or has no
            such split.
    """
    root = path.parent if root is None else root
    rows, lines = _rows(path)
    folders = _Folders(path, root)
    headed = _is_header(rows[0], folders)
    file_column, label_column, split_column = _columns(rows[0], path, headed=headed)
    body = list(zip(lines, rows, strict=True))[1 if headed else 0 :]
    classes = {row[label_column].strip() for _, row in body if len(row) > label_column} - {""}
    if split_column is not None:
        there = [name for name in dict.fromkeys(_cell(row, split_column) for _, row in body) if name]
        chosen = next((name for name in names_of(split) if name in there), None)
        if chosen is None:
            raise no_split(path, split, there[:5])
        body = [(line, row) for line, row in body if _cell(row, split_column) == chosen]
    elif split != "val" and path.stem not in names_of(split) and path.parent.name not in names_of(split):
        raise no_split(path, split, [])
    files, texts, given = [], list[str](), list[str]()
    for line, row in body:
        if len(row) <= max(file_column, label_column):
            raise DataError(
                f"{path} line {line} has {counted(len(row), 'cell')}: give a file and a class in each"
            )
        name, text = row[file_column].strip(), row[label_column].strip()
        if not name or not text:
            raise DataError(f"{path} line {line} has no {'file' if not name else 'class'}: give both")
        if "\0" in name:
            raise DataError(f"{path} line {line} has a name that is no path: {printable(name, 100)}")
        meant = folders.inside(name)
        if not meant:
            raise DataError(
                f"{path} line {line} names {printable(name, 200)}, which is outside {root}: give paths inside it"
            )
        file = folders.find(name)
        if file is None and not dead_images:
            raise DataError(
                f"{path} line {line} names no image, {printable(name, 200)}: give paths relative to {path.parent}, or "
                "use `data.bad_images=skip`"
            )
        files.append(meant[0] if file is None else file)
        texts.append(text)
        given.append(name)
    if not files:
        raise DataError(f"{path} names no image: give lines FILE,CLASS")
    labels, names = numbered(texts, classes)  # a split may lack some
    places = (path.parent, path.parent.parent) if path.parent.name in _SPLITS else (path.parent,)
    return Labelled(TableFiles(tuple(files), tuple(given), labels), labels, names, str(path), places=places)


_SPLITS = {name for names in SYNONYMS.values() for name in names}


def _cell(row: Sequence[str], column: int) -> str:
    """The text of a cell; empty if the row is too short."""
    return row[column].strip() if column < len(row) else ""


class _Folders:
    """The folders that names in a table may refer to, all inside the data folder.

    Only names are compared: a link inside the folder may lead elsewhere, as in class folders.
    """

    def __init__(self, table: Path, root: Path) -> None:
        folders = [table.parent, *(table.parent / name for name in (table.stem, *IMAGE_FOLDERS))]
        self._folders = [str(folder) for folder in folders]
        self._roots = tuple(
            os.path.join(base, "") for base in (os.path.abspath(root), os.path.realpath(root))
        )

    def inside(self, name: str) -> list[str]:
        """The paths that ``name`` may mean, that beside the table first; none if that is outside the data folder."""
        paths = [os.path.join(folder, name) for folder in self._folders]
        plain = PurePath(name)
        if not plain.anchor and ".." not in plain.parts:
            return paths
        paths = list(dict.fromkeys(map(os.path.normpath, paths)))
        inside = [path for path in paths if os.path.abspath(path).startswith(self._roots)]
        return inside if paths[0] in inside else []

    def find(self, name: str) -> str | None:
        """The file of a name, also one without its suffix."""
        paths = self.inside(name)
        if not is_image(name):
            paths += [f"{path}{suffix}" for path in paths for suffix in IMAGE_EXTENSIONS]
        return next(filter(os.path.isfile, paths), None)


def _rows(path: Path) -> tuple[list[list[str]], list[int]]:
    """The rows of a table without blank ones, and their lines in the file."""
    text = read_text(path, str(path), DataError, most=LARGEST_TABLE)
    comma = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(text.splitlines(), delimiter=comma, strict=True)
    try:
        found = [(row, reader.line_num) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as a table ({error}): write it as CSV") from None
    if not found:
        raise DataError(f"{path} is empty: give lines FILE,CLASS")
    return [row for row, _ in found], [line for _, line in found]


def _is_header(row: Sequence[str], folders: _Folders) -> bool:
    """Whether the first line names columns, and no file."""
    words = [word.strip().lower() for word in row]
    known = {*FILE_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS}
    return bool(known & set(words)) and not is_image(words[0]) and folders.find(row[0].strip()) is None


def _columns(row: Sequence[str], path: Path, *, headed: bool) -> tuple[int, int, int | None]:
    """The columns of file, class and split in the first line; without a header, the first two.

    Raises:
        DataError: there are none.
    """
    words = [word.strip().lower() for word in row]
    if not headed:
        if len(words) < 2:
            raise DataError(f"{path} has one column: give lines FILE,CLASS")
        return 0, 1, None
    found = [
        next((words.index(name) for name in names if name in words), None)
        for names in (FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)
    ]
    file, label, split = found
    if file is None or label is None:
        missing = (
            f"no column of files ({', '.join(FILE_COLUMNS[:4])})" if file is None else "no column of classes"
        )
        if file is not None:
            missing += f" ({', '.join(LABEL_COLUMNS[:4])})"
        raise DataError(
            f"{path} has the columns {printable(', '.join(row), 200)}, and {missing}: name one so"
        )
    return file, label, split
