"""Parquet and arrow files, as Hugging Face's datasets are on disk.

A folder holds ``data/train-00000-of-00002.parquet`` and the like, or is what ``save_to_disk`` wrote: a folder for each
split with arrow files. Images are encoded in the table. Names of classes come from the features in its metadata.
"""

import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from sys import intern
from typing import Any

from saqcli.data.archives import EncodedImage
from saqcli.data.folders import is_image
from saqcli.data.forms.labelled import LARGEST_IMAGE, Labelled, names_of, no_split, numbered
from saqcli.errors import DataError
from saqcli.serialization import printable, read_text, some

SUFFIXES = (".parquet", ".arrow")
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls")
MOST_ROWS = 2 * 10**7
LARGEST_LABEL = 2**31
_SHARD = re.compile(r"(?:[\w.]+-)*?(?P<split>[\w.]+)-\d{5}-of-\d{5}(-[0-9a-f]{16})?")
_CLOSED = 'pip install "saq[parquet]"'


@dataclass(frozen=True)
class ArrowFiles:
    """The files of one split, or of a file that says none."""

    files: tuple[Path, ...]
    title: str


@dataclass
class Rows:
    """Images in the rows of files.

    Attributes:
        files: the files.
        column: name of the column of images.
        starts: first row of each file, and the number of all.
        labels: of all rows.
    """

    files: tuple[str, ...]
    column: str
    starts: tuple[int, ...]
    labels: Sequence[int]
    _opened: dict[str, Any] = field(default_factory=dict, repr=False)
    _last: tuple[str, int, Any] | None = field(default=None, repr=False)  # a group of rows, as they were read

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which no other process can use."""
        return {**self.__dict__, "_opened": {}, "_last": None}

    def __getitem__(self, index: int, /) -> tuple[EncodedImage, int]:
        place = next(number for number, end in enumerate(self.starts[1:]) if index < end)
        file = self.files[place]
        name = f"row {index - self.starts[place]} of {file}"
        try:
            cell = self._cell(file, index - self.starts[place])
        except Exception as error:  # pyarrow raises many kinds on damaged files
            raise OSError(f"{name} cannot be read: {printable(str(error), 100)}") from None
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(content, bytes):
            raise OSError(f"{name} has no image in the table")
        if len(content) > LARGEST_IMAGE:
            raise OSError(f"{name} has {len(content):,} bytes")
        return EncodedImage(content, name), self.labels[index]

    def _cell(self, file: str, row: int) -> Any:
        """The value of a row; the group of rows around it is kept."""
        opened = self._opened.get(file)
        if opened is None:
            opened = self._opened[file] = _open(Path(file))
        for number, (start, stop) in enumerate(opened.groups):
            if start <= row < stop:
                if self._last is None or self._last[:2] != (file, number):
                    self._last = (file, number, opened.read(number, self.column))
                return self._last[2][row - start].as_py()
        raise IndexError(row)

    def lines(self) -> Iterator[str]:
        """What identifies the images: rows and labels of each file, since images have no names here."""
        for file, start, stop in zip(self.files, self.starts, self.starts[1:], strict=False):
            yield f"{Path(file).name}\0{stop - start}"
        for label in self.labels:
            yield str(label)


@dataclass
class _Parquet:
    """A parquet file."""

    file: Any

    @property
    def schema(self) -> Any:
        """Its schema of arrow."""
        return self.file.schema_arrow

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First and last row of each group."""
        sizes = [self.file.metadata.row_group(each).num_rows for each in range(self.file.num_row_groups)]
        ends = list(accumulate(sizes))
        return list(zip([0, *ends], ends, strict=False))

    def read(self, group: int, column: str) -> Any:
        """A column of a group."""
        return self.file.read_row_group(group, columns=[column]).column(0)


@dataclass
class _Arrow:
    """An arrow file, mapped into memory."""

    batches: list[Any]
    schema: Any

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First and last row of each batch."""
        ends = list(accumulate(batch.num_rows for batch in self.batches))
        return list(zip([0, *ends], ends, strict=False))

    def read(self, group: int, column: str) -> Any:
        """A column of a batch."""
        return self.batches[group].column(self.schema.get_field_index(column))


def find_arrow(data: Path, split: str) -> ArrowFiles | None:
    """The files of a split: ``data`` itself, or those in a folder whose names say it."""
    if data.is_file():
        return ArrowFiles((data,), str(data)) if data.suffix.lower() in SUFFIXES else None
    if not data.is_dir():
        return None
    for name in names_of(split):
        if files := _in(data / name):
            return ArrowFiles(files, f"{data} ({name})")
    folders = {entry.name for entry in data.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if not folders <= {"data"}:
        return None
    files = (*_in(data), *_in(data / "data"))
    if not files:
        return None
    by_split: dict[str, list[Path]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.stem)
        by_split.setdefault(match["split"] if match else file.stem, []).append(file)
    chosen = next((name for name in names_of(split) if name in by_split), None)
    chosen = chosen or next(
        (found for name in names_of(split) for found in by_split if found.endswith(f"-{name}")), None
    )
    if chosen is not None:
        return ArrowFiles(tuple(by_split[chosen]), f"{data} ({chosen})")
    if split == "val" and len(by_split) == 1 and set(by_split) <= {"data"}:
        return ArrowFiles(files, str(data))
    raise no_split(data, split, sorted(by_split)[:5])


def _in(folder: Path) -> tuple[Path, ...]:
    """The files of the data set in a folder, sorted; none if it holds class folders, with a table beside them.

    ``save_to_disk`` lists its files in state.json. Beside them, datasets leaves ``cache-*.arrow``: results of ``map``.

    Raises:
        DataError: a listed file is missing.
    """
    files = sorted(path for suffix in SUFFIXES for path in folder.glob(f"*{suffix}") if path.is_file())
    if not files or _has_class_folders(folder):
        return ()
    if listed := _listed(folder / "state.json"):
        if missing := [name for name in listed if not (folder / name).is_file()]:
            raise DataError(
                f"{folder / 'state.json'} lists {some(missing, 2)}, not in {folder}: restore the data"
            )
        return tuple(folder / name for name in listed)
    saved = [path for path in files if path.match("data-*.arrow")]
    return tuple(saved or (path for path in files if not path.match("cache-*")))


def _listed(state: Path) -> list[str]:
    """The names of files in the state.json of ``save_to_disk``; none if it is missing, damaged, or names other places."""
    try:
        entries = json.loads(read_text(state, str(state), DataError))["_data_files"]
        names = [entry["filename"] for entry in entries]
    except (DataError, KeyError, TypeError, ValueError, RecursionError):
        return []
    plain = all(isinstance(name, str) and Path(name).name == name and "\0" not in name for name in names)
    kinds = plain and all(name.lower().endswith(SUFFIXES) for name in names)
    return names if kinds and len(set(names)) == len(names) else []


def _has_class_folders(folder: Path) -> bool:
    """Whether a folder in ``folder`` holds an image, at any depth."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.startswith("."):
            for _, _, names in os.walk(entry):
                if any(is_image(name) and not name.startswith(".") for name in names):
                    return True
    return False


def open_arrow(found: ArrowFiles, split: str) -> Labelled:
    """The images of one split.

    Raises:
        DataError: pyarrow is missing, a file is damaged, or it has no columns of images and labels.
    """
    if split != "val" and len(found.files) == 1 and found.title == str(found.files[0]):
        raise no_split(found.title, split, [])
    first = _opened(found.files[0])
    features = _features(first.schema)
    names = list(first.schema.names)
    column = _column(names, features, "Image", IMAGE_COLUMNS, "images", found)
    label = _column(names, features, "ClassLabel", LABEL_COLUMNS, "labels", found)
    numbers, texts = array("q"), list[str]()
    starts = [0]
    for path in found.files:
        opened = _opened(path)
        if not {column, label} <= set(opened.schema.names):
            raise DataError(
                f"{path} has no columns {column} and {label}, as {found.files[0]} has: give files alike"
            )
        if starts[-1] + sum(stop - start for start, stop in opened.groups) > MOST_ROWS:
            raise DataError(f"{path} says that it has more than {MOST_ROWS:,} rows: give another file")
        try:
            for group in range(len(opened.groups)):
                for value in opened.read(group, label).to_pylist():
                    _add(value, numbers, texts, path, starts[-1])
        except DataError:
            raise
        except Exception as error:  # pyarrow raises many kinds on damaged files
            raise _damaged(path, error) from None
        starts.append(len(numbers) + len(texts))
    if not starts[-1]:
        raise DataError(f"{found.title} has no rows: give data with images")
    if numbers and texts:
        raise DataError(f"{found.title} has numbers and texts as labels in {label}: give labels of one kind")
    labels: Sequence[int] = numbers
    if texts:
        labels, classes = numbered(texts)
    else:
        classes = _class_names(features.get(label))
        if classes and max(numbers) >= len(classes):
            raise DataError(
                f"{found.title} has the label {max(numbers)}, and names for {len(classes)} classes"
            )
    source = Rows(tuple(map(str, found.files)), column, tuple(starts), labels)
    in_order = bool(_class_names(features.get(label)))
    return Labelled(source, labels, classes, found.title, in_order=in_order, places=(found.files[0].parent,))


def _add(value: Any, numbers: "array[int]", texts: list[str], path: Path, start: int) -> None:
    """Add the label of the next row of ``path``, whose first row is ``start``, to those of its kind.

    False and True are 0 and 1.

    Raises:
        DataError: it is neither a class index nor a text.
    """
    if isinstance(value, int) and 0 <= value < LARGEST_LABEL:
        numbers.append(int(value))
    elif isinstance(value, str) and value:
        texts.append(intern(value))
    else:
        raise DataError(
            f"{path} has no label in row {len(numbers) + len(texts) - start} ({printable(repr(value), 100)}): "
            "give data with labels"
        )


def _column(
    names: list[str],
    features: dict[str, Any],
    kind: str,
    usual: tuple[str, ...],
    what: str,
    found: ArrowFiles,
) -> str:
    """The column of a kind of feature, or of a usual name."""
    typed = [
        name for name in names if isinstance(features.get(name), dict) and features[name].get("_type") == kind
    ]
    by_name = [name for name in usual if name in names]
    chosen = next((name for name in by_name if name in typed), None) or next(iter([*typed, *by_name]), None)
    if chosen is None:
        columns = printable(", ".join(names), 200)
        raise DataError(f"{found.title} has the columns {columns}, and none of {what}: name one {usual[0]}")
    return chosen


def _features(schema: Any) -> dict[str, Any]:
    """The features that datasets wrote into the schema; none if they are missing or damaged."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _class_names(feature: Any) -> tuple[str, ...]:
    names = feature.get("names") if isinstance(feature, dict) else None
    valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if valid and names and len(set(names)) == len(names) else ()


def _opened(path: Path) -> Any:
    """``_open``, with one line about what is wrong.

    Raises:
        DataError: pyarrow is missing, or the file is damaged.
    """
    try:
        return _open(path)
    except ImportError:
        raise DataError(
            f"{path} needs a package that is missing: {_CLOSED}, or give a folder of images"
        ) from None
    except Exception as error:  # pyarrow raises many kinds on damaged files
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> DataError:
    reason = printable(" ".join(str(error).split()) or type(error).__name__, 150).rstrip(". ")
    return DataError(f"{path} cannot be read ({reason}): replace the file")


def _open(path: Path) -> Any:
    if path.suffix.lower() == ".parquet":
        from pyarrow.parquet import ParquetFile

        return _Parquet(ParquetFile(path))
    import pyarrow

    mapped = pyarrow.memory_map(str(path))
    try:
        reader = pyarrow.ipc.open_stream(mapped)
        return _Arrow(list(reader), reader.schema)
    except pyarrow.ArrowInvalid:  # not as a stream, which datasets writes, but with an index at its end
        mapped.seek(0)
        file = pyarrow.ipc.open_file(mapped)
        return _Arrow([file.get_batch(number) for number in range(file.num_record_batches)], file.schema)
