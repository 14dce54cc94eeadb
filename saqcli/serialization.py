"""Strict reading of untrusted JSON and TOML, and atomic writing of files.

Every JSON object on disk is a pydantic model that forbids unknown keys. Pydantic's own report fills a screen; messages
here give the first error, its location, and what was expected, on one line. Problems that pydantic does not see are
checked first: oversized files, duplicate keys, excessive nesting, other schema versions.

Files are written to a temporary file in the same folder, flushed to disk, and renamed, so that no reader sees a partial
file.
"""

import codecs
import errno
import json
import math
import os
import re
import tempfile
import tomllib
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from saqcli._version import __version__
from saqcli.errors import CannotWrite, ConfigError, RunDirectoryError, SaqError
from saqcli.units import counted

Model = TypeVar("Model", bound=BaseModel)

MOST_BYTES = 2**25  # of a text file
MOST_NESTED = 64  # levels of objects and lists
_MOST_DOTS = 1000  # in a line of TOML: a key of n parts takes time and memory O(n**2)
MAX_REPORTED = 10  # reported mismatches of one object
_SHOWN = 300  # maximum characters of file content in a message
_MARKS = {  # byte-order marks, the longer ones first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
UNFINISHED = ".unfinished-"  # name prefix of files that are being written
_REMEDIES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free space in your quota",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "its folder is missing",
}


def read_text(path: Path, source: str, error: type[SaqError] = ConfigError, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Args:
        path: of the file.
        source: name of the file in messages.
        error: the error raised if it cannot be read.
        most: maximum size in bytes.

    Raises:
        SaqError: the given ``error``: no such file, another encoding, or more than ``most`` bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise error(f"{source} cannot be read: it has more than {counted(most, 'byte')}")
    except OSError as failure:
        raise error(f"{source} cannot be read: {failure.strerror or failure}") from None
    except ValueError as failure:  # a path with a NUL
        raise error(f"{source} cannot be read: {printable(str(failure), _SHOWN)}") from None
    return _decoded(data, source, error)


def _decoded(data: bytes, source: str, error: type[SaqError]) -> str:
    """``data`` decoded as UTF-8; the message of the error names the encoding that it seems to have."""
    name = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if name is None and b"\0" in data:
        name = "UTF-16" if data[:2].count(0) == 1 else "not text"
    if name == "not text":
        raise error(f"{source} cannot be read: it is not a text file")
    if name is not None:
        raise error(f"{source} cannot be read: it is encoded in {name}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        raise error(
            f"{source} cannot be read: byte 0x{data[failure.start]:02x} in line {line} is not UTF-8; save it as UTF-8"
        ) from None


def read_json(text: str | bytes, source: str, error: type[SaqError] = ConfigError) -> Any:
    """``text`` as a tree of plain Python objects; raises as ``parse_json``."""
    try:
        json.loads(text, object_pairs_hook=_check_unique)  # pydantic accepts duplicate keys
        tree = from_json(text)
    except RecursionError:
        raise error(f"{source}: it is nested deeper than {MOST_NESTED} levels") from None
    except _DuplicateKey as duplicate:
        raise error(f"{source}: key {printable(duplicate.key, _SHOWN)!r} occurs twice") from None
    except ValueError as failure:
        raise error(f"{source}: it is not JSON: {printable(str(failure), _SHOWN)}") from None
    check_nesting(tree, source, error)
    return tree


def read_toml(text: str, source: str) -> dict[str, Any]:
    """``text`` as a tree of plain Python objects.

    Raises:
        ConfigError: it is not valid TOML, or nested too deeply.
    """
    too_deep = f"{source}: it is nested deeper than {MOST_NESTED} levels"
    if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
        raise ConfigError(too_deep)
    try:
        tree = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(too_deep) from None
    except ValueError as failure:  # invalid TOML or an invalid number
        raise ConfigError(f"{source}: it is not TOML: {printable(str(failure), _SHOWN)}") from None
    check_nesting(tree, source)
    return tree


def parse_json(
    schema: type[Model], text: str | bytes, source: str, error: type[SaqError] = ConfigError
) -> Model:
    """``text`` as a ``schema``.

    Args:
        schema: the pydantic model to read.
        text: JSON.
        source: name of the text in messages: a path, an option.
        error: the error raised if the text does not match the schema.

    Raises:
        SaqError: the given ``error``, with the first mismatch and the number of others.
    """
    _check_version(schema, read_json(text, source, error), source, error)
    try:
        return schema.model_validate_json(text)
    except ValidationError as failure:
        raise error(f"{source}: {describe(failure)}") from None


def parse_object(
    schema: type[Model], value: object, source: str, error: type[SaqError] = ConfigError
) -> Model:
    """``value``, a tree of plain Python objects, as a ``schema``; raises as ``parse_json``."""
    _check_version(schema, value, source, error)
    try:
        return schema.model_validate(value)
    except ValidationError as failure:
        if error is ConfigError:
            raise Misfit(source, failure) from None
        raise error(f"{source}: {describe(failure)}") from None


def check_nesting(tree: object, source: str, error: type[SaqError] = ConfigError) -> None:
    """Raise an error for lists and objects nested so deeply that recursion would fail.

    Raises:
        SaqError: the given ``error``: more than ``MOST_NESTED`` levels.
    """
    level: Sequence[object] = [tree]
    for _ in range(MOST_NESTED + 1):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise error(f"{source}: it is nested deeper than {MOST_NESTED} levels")


def json_text(value: Any, **layout: Any) -> str:
    """``value`` as JSON, NaN and infinity as null; all JSON that pydantic does not write comes from here.

    Args:
        value: a tree of plain Python objects.
        layout: further arguments of ``json.dumps``.

    Example:
        >>> json_text({"loss": float("nan"), "top1": 91.5})
        '{"loss": null, "top1": 91.5}'
    """
    return json.dumps(_finite(value), allow_nan=False, **layout)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def named_path(text: str) -> Path:
    """The path for ``text`` from a user or a file, with ``~`` expanded.

    Raises:
        ConfigError: not a possible path: it is too long, or contains NUL.
    """
    path = Path(os.path.expanduser(text))
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise ConfigError(f"{printable(text, 100)} is not a path ({reason}): name another") from None
    return path


def describe(failure: ValidationError) -> str:
    """The first mismatch on one line, and the number of others."""
    errors = failure.errors(include_url=False, include_context=False, include_input=False)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return _describe_one(errors[0]) + more


def _describe_one(first: Any) -> str:
    """One error of pydantic."""
    place = printable(".".join(str(part) for part in first["loc"]), _SHOWN)
    if first["type"] == "extra_forbidden":
        text = f"unknown key {place!r}"
    elif first["type"] == "missing":
        text = f"key {place!r} is missing"
    else:
        reason = printable(first["msg"], _SHOWN)
        text = f"{place}: {reason}" if place else reason
    return text[0].lower() + text[1:]


def printable(text: str, most: int = 600) -> str:
    """Untrusted ``text`` as one line of printable characters, truncated to ``most``.

    Example:
        >>> printable("conv1\\nerror: \\x1b[31mall is lost")
        'conv1\\\\nerror: \\\\x1b[31mall is lost'
    """
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return line if len(line) <= most else f"{line[: most - 3]}..."


class Misfit(ConfigError):
    """An object that does not match its schema; the message names the first mismatch.

    Args:
        source: name of the object in the message.
        failure: pydantic's report.
    """

    def __init__(self, source: str, failure: ValidationError) -> None:
        super().__init__(f"{source}: {describe(failure)}")
        self._source = source
        self._errors = failure.errors(include_url=False, include_context=False, include_input=False)

    @property
    def places(self) -> list[tuple[int | str, ...]]:
        """Keys from the root, of every mismatch."""
        return [error["loc"] for error in self._errors]

    @property
    def parts(self) -> list[SaqError]:
        """One error per mismatch, up to ``MAX_REPORTED``."""
        return [
            ConfigError(f"{self._source}: {_describe_one(error)}") for error in self._errors[:MAX_REPORTED]
        ]


class _DuplicateKey(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _check_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def _check_version(schema: type[BaseModel], value: object, source: str, error: type[SaqError]) -> None:
    """Report another version of saq, before its changes to the format appear as errors."""
    field = schema.model_fields.get("schema_version")
    if field is None or not isinstance(value, dict):
        return
    version, readable = value.get("schema_version", field.default), typing.get_args(field.annotation)
    if type(version) is int and version not in readable:
        known = max(readable)
        raise error(
            f"{source}: it was written by another version of saq: its schema_version is {_digits(version)}, saq "
            f"{__version__} reads {known}; {'upgrade saq' if version > known else 'create the file again'}"
        )


def _digits(number: int) -> str:
    return str(number) if abs(number) < 10**20 else "a very large number"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path``, with its suffix; renamed to ``path`` at the end, except on an error.

    The folder must exist: one that was removed meanwhile is not created again.

    Raises:
        CannotWrite: the folder is missing or cannot be written to, or the disk is full.
    """
    try:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f"{UNFINISHED}{path.stem}.", suffix=path.suffix
        )
        os.close(handle)
    except OSError as error:
        raise cannot_write(path, error) from None
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):  # the disk may have become read-only
            temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """The error that names ``path``, the reason, and the remedy."""
    reason = error.strerror or str(error)
    other = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    if other.parent != path.parent:  # a file that it is built from could not be written
        reason += f": {other}"
    remedy = _REMEDIES.get(error.errno or 0)
    return CannotWrite(f"{path} cannot be written ({reason})" + (f": {remedy}" if remedy else ""))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents.

    Raises:
        RunDirectoryError: permission denied, or another kind of file has this name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be created: {error.strerror}") from None


def check_can_write(path: Path) -> None:
    """Raise an error if ``make_folder`` could not create the folder, or no file could be written to it.

    Raises:
        CannotWrite: with the reason.
    """
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise CannotWrite(f"{path} cannot be created: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CannotWrite(f"{path} cannot be written: {there} is read-only")


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that killed processes left in ``folder``; no other process may be writing there."""
    for path in folder.glob(f"{UNFINISHED}*"):
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Flush the new name to disk; does nothing if the folder cannot be flushed."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key like ``timm.utils.misc.natural_key``, 2 before 10; names equal to it (2 and 02) sort as text."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first ``limit`` names for a message, and the number of others.

    Example:
        >>> some(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(name, 60) for name in names[:limit]) + more
