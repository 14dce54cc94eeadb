"""Parquet and arrow files, as Hugging Face's datasets are on disk.

A folder holds ``data/train-00000-of-00002.parquet`` and the like, or is what ``save_to_disk`` wrote: a folder for each
split with arrow files. Images are encoded in the table. Names of classes come from the features in its metadata.
"""

import hashlib
import json
import os
import re
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
LONGEST_LABEL = 1000  # characters
BATCH = 64  # images read at once
LABELS = 1024  # labels read at once
KEPT = 2**26  # bytes of images that stay in memory, in each process
EXPANSION = 100  # images in a parquet file are compressed at most to this share
LARGEST_UNPACKED = 2**30  # bytes of compressed arrow files, which are unpacked as a whole
SAMPLED, SAMPLES = 2**14, 256  # bytes of a block, and blocks, of which fingerprints are made
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
    _window: "_Window | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which no other process can use."""
        return {**self.__dict__, "_opened": {}, "_window": None}

    def __getitem__(self, index: int, /) -> tuple[EncodedImage, int]:
        place = bisect_right(self.starts, index) - 1
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
        """The value of a row; those before it in its group are kept, as far as they fit."""
        opened = self._opened.get(file)
        if opened is None:
            opened = self._opened[file] = _open(Path(file))
        number = bisect_right(opened.groups, row, key=lambda group: group[0]) - 1
        while opened.groups[number][1] <= row:  # empty groups
            number += 1
        place, window = row - opened.groups[number][0], self._window
        if window is None or window.group != (file, number) or place < window.first:
            window = self._window = _Window((file, number), opened.batches(number, self.column, BATCH))
        return window.cell(place).as_py()

    def lines(self) -> Iterator[str]:
        """What identifies the images, which have no names here: a part of each file, its rows, and labels."""
        for file, start, stop in zip(self.files, self.starts, self.starts[1:], strict=False):
            yield f"{Path(file).name}\0{stop - start}\0{_sampled(Path(file))}"
        for label in self.labels:
            yield str(label)


@dataclass
class _Window:
    """The latest rows of a group, ``KEPT`` bytes of them, and an iterator over the rest.

    Attributes:
        group: file and number of the group.
        rest: arrays that were not read yet.
        first: row of the group that is the first one kept.
        stop: row after the last one kept.
    """

    group: tuple[str, int]
    rest: Iterator[Any]
    first: int = 0
    stop: int = 0
    kept: deque[Any] = field(default_factory=deque)
    size: int = 0

    def cell(self, row: int) -> Any:
        """The value of a row, ``first`` or later."""
        while row >= self.stop:
            part = next(self.rest, None)
            if part is None:
                raise IndexError(f"its group of rows has {self.stop}")
            self.kept.append(part)
            self.stop += len(part)
            self.size += part.nbytes
            while self.size > KEPT and len(self.kept) > 1:
                dropped = self.kept.popleft()
                self.first += len(dropped)
                self.size -= dropped.nbytes
        place = self.stop
        for part in reversed(self.kept):
            place -= len(part)
            if row >= place:
                return part[row - place]
        raise IndexError(row)


def _sampled(path: Path) -> str:
    """The size of a file, and a hash of all its bytes or, if they are many, of blocks spread from begin to end."""
    size, hashed = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= SAMPLED * SAMPLES:
            hashed.update(file.read())
        else:
            for place in range(SAMPLES):
                file.seek((size - SAMPLED) * place // (SAMPLES - 1))
                hashed.update(file.read(SAMPLED))
    return f"{size}:{hashed.hexdigest()}"


@dataclass
class _Parquet:
    """A parquet file."""

    file: Any

    @property
    def schema(self) -> Any:
        """Its schema of arrow."""
        return self.file.schema_arrow

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """First and last row of each group."""
        sizes = [self.file.metadata.row_group(each).num_rows for each in range(self.file.num_row_groups)]
        ends = list(accumulate(sizes))
        return list(zip([0, *ends], ends, strict=False))

    def batches(self, group: int, column: str, rows: int) -> Iterator[Any]:
        """A column of a group, ``rows`` at most in each array."""
        average = self.size_of(group, column) // max(1, self.groups[group][1] - self.groups[group][0])
        rows = max(1, min(rows, KEPT // max(1, average)))
        parts = self.file.iter_batches(
            batch_size=rows, row_groups=[group], columns=[column], use_threads=False
        )
        return (part.column(0) for part in parts)

    def size_of(self, group: int, column: str) -> int:
        """The bytes of a column of a group, as the file says."""
        found = self.file.metadata.row_group(group)
        chunks = (found.column(each) for each in range(found.num_columns))
        return sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.partition(".")[0] == column
        )


@dataclass
class _Arrow:
    """An arrow file, mapped into memory."""

    parts: list[Any]
    schema: Any

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """First and last row of each batch."""
        ends = list(accumulate(part.num_rows for part in self.parts))
        return list(zip([0, *ends], ends, strict=False))

    def batches(self, group: int, column: str, rows: int) -> Iterator[Any]:
        """A column of a batch, ``rows`` at most in each array."""
        whole = self.parts[group].column(self.schema.get_field_index(column))
        return (whole.slice(start, rows) for start in range(0, len(whole), rows))


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
    """The files in the state.json of ``save_to_disk``; none if it is missing, damaged, or names other places."""
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
        rows = sum(stop - start for start, stop in opened.groups)
        if starts[-1] + rows > MOST_ROWS:
            raise DataError(f"{path} says that it has more than {MOST_ROWS:,} rows: give another file")
        try:
            _check_sizes(opened, column, path)
            for group in range(len(opened.groups)):
                for part in opened.batches(group, label, LABELS):
                    for value in part.to_pylist():
                        _add(value, numbers, texts, path, starts[-1])
        except DataError:
            raise
        except Exception as error:  # pyarrow raises many kinds on damaged files
            raise _damaged(path, error) from None
        starts.append(len(numbers) + len(texts))
        if starts[-1] - starts[-2] != rows:
            raise DataError(
                f"{path} says that it has {rows:,} rows, and has {starts[-1] - starts[-2]:,} labels: replace the file"
            )
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


def _check_sizes(opened: Any, column: str, path: Path) -> None:
    """Check what a parquet file says about its images, before any is read.

    Raises:
        DataError: they have more bytes than images can have, or than the file can hold.
    """
    if not isinstance(opened, _Parquet):
        return
    most = EXPANSION * path.stat().st_size + KEPT
    for number, (start, stop) in enumerate(opened.groups):
        size = opened.size_of(number, column)
        if size > min(most, LARGEST_IMAGE * max(1, stop - start)):
            raise DataError(
                f"{path} says that rows {start} to {stop - 1} have {size:,} bytes of images, too many for "
                f"a file of {path.stat().st_size:,}: replace the file"
            )


def _add(value: Any, numbers: "array[int]", texts: list[str], path: Path, start: int) -> None:
    """Add the label of the next row of ``path``, whose first row is ``start``, to those of its kind.

    False and True are 0 and 1.

    Raises:
        DataError: it is neither a class index nor a text.
    """
    if isinstance(value, int) and 0 <= value < LARGEST_LABEL:
        numbers.append(int(value))
    elif isinstance(value, str) and 0 < len(value) <= LONGEST_LABEL:
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
    except DataError:
        raise
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

        return _Parquet(ParquetFile(path, buffer_size=2**20, pre_buffer=False))  # else it reads whole groups
    import pyarrow

    mapped = pyarrow.memory_map(str(path))
    try:
        reader = pyarrow.ipc.open_stream(mapped)
        return _Arrow(_mapped(reader, path), reader.schema)
    except pyarrow.ArrowInvalid:  # not as a stream, which datasets writes, but with an index at its end
        mapped.seek(0)
        file = pyarrow.ipc.open_file(mapped)
        batches = (file.get_batch(number) for number in range(file.num_record_batches))
        return _Arrow(_mapped(batches, path), file.schema)


def _mapped(batches: Iterable[Any], path: Path) -> list[Any]:
    """The batches of an arrow file, which take no memory unless they are compressed.

    Raises:
        DataError: they are, and are large.
    """
    import pyarrow

    found, before = [], pyarrow.total_allocated_bytes()
    for batch in batches:
        found.append(batch)
        if pyarrow.total_allocated_bytes() - before > LARGEST_UNPACKED:
            raise DataError(
                f"{path} is compressed, and has more than {LARGEST_UNPACKED:,} bytes: save it without compression"
            )
    return found
