"""CIFAR's own files, cifar-10-batches-py and cifar-100-python, which are pickles.

A pickle can run any code. These are read by an interpreter that knows the opcodes of these files alone: numbers,
strings, lists, dictionaries, and the three calls that make an array of bytes, which it performs itself. Any other
opcode or name refuses the file.
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saqcli.data.forms.labelled import Labelled, names_of, no_split
from saqcli.errors import DataError
from saqcli.serialization import printable

SIDE, CHANNELS = 32, 3
LARGEST_FILE = 2**28  # bytes
MOST_OPCODES = 10**6  # of a file; CIFAR-100's largest has 50,000 images with two labels and a name
FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
FILES: dict[str, dict[str, tuple[str, ...]]] = {  # of each split
    "cifar-10": {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    "cifar-100": {"train": ("train",), "test": ("test",)},
}
META = {"cifar-10": "batches.meta", "cifar-100": "meta"}
KEYS = {  # of labels and of their names
    "cifar-10": ("labels", "label_names"),
    "cifar-100": ("fine_labels", "fine_label_names"),
}
GLOBALS = {
    **dict.fromkeys(("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"), "array"),
    "numpy ndarray": "class",
    "numpy dtype": "dtype",
}


@dataclass(frozen=True)
class Cifar:
    """Folder and kind (``cifar-10`` or ``cifar-100``) of a data set."""

    folder: Path
    kind: str


@dataclass(frozen=True)
class Pixels:
    """Decoded images.

    Attributes:
        pixels: (N, 3, 32, 32), uint8.
        labels: of the images.
        title: name of the split.
    """

    pixels: "np.ndarray[Any, np.dtype[np.uint8]]"
    labels: tuple[int, ...]
    title: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0))), self.labels[
            index
        ]

    def lines(self) -> Iterator[str]:
        """Sums of pixels and labels: images have no names here."""
        for image, label in zip(self.pixels, self.labels, strict=True):
            yield f"{int(image.sum())}\0{label}"


def find_cifar(data: Path) -> Cifar | None:
    """The data set in ``data``, or in its folder of the usual name."""
    for folder in (data, *(data / name for name in FOLDERS)):
        for kind, meta in META.items():
            if (folder / meta).is_file() and (folder / FILES[kind]["test"][0]).is_file():
                return Cifar(folder, kind)
    return None


def open_cifar(found: Cifar, split: str) -> Labelled:
    """The images of one split.

    Raises:
        DataError: there is no such split, or a file is missing, damaged or holds something else.
    """
    files = FILES[found.kind]
    name = next((name for name in names_of(split) if name in files), None)
    if name is None:
        raise no_split(found.folder, split, list(files))
    label_key, names_key = KEYS[found.kind]
    names = _strings(_read(found.folder / META[found.kind]), names_key, found.folder / META[found.kind])
    parts, labels = [], list[int]()
    for path in (found.folder / file for file in files[name]):
        pixels, some = _images(_read(path), label_key, path, len(names))
        parts.append(pixels)
        labels += some
    title = f"{found.folder} ({name})"
    return Labelled(Pixels(np.concatenate(parts), tuple(labels), title), labels, names, title, in_order=True)


def _images(
    content: dict[str, Any], key: str, path: Path, classes: int
) -> tuple["np.ndarray[Any, np.dtype[np.uint8]]", list[int]]:
    """The pixels (N, 3, 32, 32) and labels of a batch."""
    data, labels = content.get("data"), content.get(key)
    if not isinstance(labels, list) or not all(
        type(label) is int and 0 <= label < classes for label in labels
    ):
        raise _foreign(path, f"its {key} are no list of classes 0 to {classes - 1}")
    size = CHANNELS * SIDE * SIDE
    if not isinstance(data, _Array) or data.shape != (len(labels), size) or data.dtype != "u1":
        raise _foreign(path, f"its data is no array of {len(labels)} x {size} bytes")
    if len(data.content) != len(labels) * size:
        raise _foreign(
            path, f"its data has {len(data.content):,} bytes, and its shape {len(labels) * size:,}"
        )
    pixels = np.frombuffer(data.content, np.uint8).reshape(-1, CHANNELS, SIDE, SIDE)
    if data.columns_first:
        raise _foreign(path, "its data is in the order of Fortran")
    return pixels, labels


def _strings(content: dict[str, Any], key: str, path: Path) -> tuple[str, ...]:
    names = content.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _foreign(path, f"it has no list {key}")
    if len(set(names)) < len(names):
        raise _foreign(path, f"{key} has a class twice")
    return tuple(names)


@dataclass
class _Array:
    """An array of bytes as a pickle builds it; nothing is computed."""

    shape: tuple[int, ...] = ()
    dtype: str = ""
    columns_first: bool = False
    content: bytes = b""


@dataclass
class _Named:
    """A name that a pickle may call, or what the call of ``numpy dtype`` gives."""

    kind: str
    text: str = ""


def _foreign(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is no file of CIFAR ({printable(why, 200)}): give the files as they were published"
    )


def _read(path: Path) -> dict[str, Any]:
    """The dictionary in a file.

    Raises:
        DataError: the file is missing, too large, or holds anything but such a dictionary.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): restore the file") from None
    if len(content) > LARGEST_FILE:
        raise _foreign(path, f"it has more than {LARGEST_FILE:,} bytes")
    try:
        value = _interpreted(content)
    except _Refused as refused:
        raise _foreign(path, str(refused)) from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _foreign(
            path, f"it is damaged: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None
    if not isinstance(value, dict):
        raise _foreign(path, "it holds no dictionary")
    return value


class _Refused(Exception):
    """An opcode or a name that these files do not have."""


PLAIN = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG1", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BINSTRING", "SHORT_BINSTRING", "BINUNICODE"),
}


def _interpreted(content: bytes) -> Any:
    """The value that the opcodes describe.

    An opcode allocates a bounded amount, or as much as its argument; arrays share the bound of a file.
    """
    stack: list[Any] = []  # since the last mark
    below: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    room = LARGEST_FILE  # for the content of arrays, which a file may build many times from one string

    def since_mark() -> list[Any]:
        nonlocal stack
        if not below:
            raise _Refused("its stack has no mark")
        found, stack = stack, below.pop()
        return found

    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if count >= MOST_OPCODES:
            raise _Refused(f"it has more than {MOST_OPCODES:,} opcodes")
        if name in PLAIN:
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}.get(name, argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(name[-1])
            if len(stack) < length:
                raise _Refused("its stack ends early")
            stack[-length:] = [tuple(stack[-length:])]
        elif name == "TUPLE":
            values = since_mark()
            stack.append(tuple(values))
        elif name == "APPEND":
            value = stack.pop()
            _list(stack[-1]).append(value)
        elif name == "APPENDS":
            values = since_mark()
            _list(stack[-1]).extend(values)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set(stack[-1], [key, value])
        elif name == "SETITEMS":
            values = since_mark()
            _set(stack[-1], values)
        elif name == "GLOBAL":
            if argument not in GLOBALS:
                raise _Refused(f"it names {argument.replace(' ', '.')}")
            stack.append(_Named(GLOBALS[argument]))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_called(called, arguments))
        elif name == "BUILD":
            state = stack.pop()
            room -= _build(stack[-1], state, room)
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise _Refused(f"it has the opcode {name}")
    raise _Refused("it has no end")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Refused("it appends to what is no list")
    return value


def _set(value: Any, pairs: list[Any]) -> None:
    if not isinstance(value, dict) or len(pairs) % 2:
        raise _Refused("it sets items of what is no dictionary")
    for key, item in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(key, str):
            raise _Refused("it has a key that is no text")
        value[key] = item


def _called(called: Any, arguments: Any) -> Any:
    """What one of the three calls makes."""
    if isinstance(called, _Named) and isinstance(arguments, tuple):
        if called.kind == "array" and arguments and arguments[0] == _Named("class"):
            return _Array()
        if called.kind == "dtype" and not called.text and arguments and isinstance(arguments[0], str):
            return _Named("dtype", arguments[0])
    raise _Refused("it calls something else than numpy's array")


def _build(value: Any, state: Any, room: int) -> int:
    """The state of an array, of at most ``room`` bytes; their number.

    That of a type says only the order of bytes, of which there is one each.
    """
    if isinstance(value, _Named) and value.kind == "dtype" and value.text:
        return 0
    if not isinstance(value, _Array) or not isinstance(state, tuple) or len(state) != 5:
        raise _Refused("it builds something else than numpy's array")
    _, shape, dtype, columns_first, content = state
    if not isinstance(content, str) or not isinstance(shape, tuple) or not isinstance(dtype, _Named):
        raise _Refused("its array is not described by shape, type and bytes")
    if len(content) > room:
        raise _Refused(f"its arrays have more than {LARGEST_FILE:,} bytes")
    value.shape, value.dtype, value.columns_first = shape, dtype.text, bool(columns_first)
    value.content = content.encode("latin-1")
    return len(content)
