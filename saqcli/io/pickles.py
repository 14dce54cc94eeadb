"""What a pickle would do, told from its opcodes and without doing any of it.

torch's restricted unpickler calls nothing but what tensors are made of. Yet it can be kept busy for ever, or made to
take all memory: by containers that hold each other twice, level over level (``a = (b, b)``, ``b = (c, c)``, ...), by
containers that hold themselves, by ``bytearray(10**12)``, by archives that unfold to more than they are. Files of
weights have none of these.
"""

import lzma
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MOST_UNFOLDED = 2**24  # values of a pickle once every shared one is written out
MOST_PICKLES = 5  # in a file: torch before 1.6 writes five, the tensors' bytes after them
SPARE_BYTES = 2**20
_REFUSED = {"builtins.bytearray", "__builtin__.bytearray", "_codecs.encode", "builtins.complex"}
_APPENDING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


# What damaged pickles and archives raise, those of a kind that torch does not write, and those with a password.
_DAMAGED = (
    *(ValueError, IndexError, EOFError, OSError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, lzma.LZMAError),
)


class Strange(Exception):
    """A file that no program for weights writes; the message says what is wrong, after "the file".

    Attributes:
        called: what it names up to there.
    """

    def __init__(self, message: str, called: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.called = called


@dataclass
class _Value:
    """On the stack: how many values it holds, itself included, and whether it was taken from the memo."""

    size: int = 1
    shared: bool = False


def globals_of(path: Path) -> list[str]:
    """Everything that the pickles of a file name in order to call it, as ``module.name``; what is damaged ends it.

    Raises:
        Strange: reading it could take all time or memory.
    """
    found: list[str] = []
    try:
        for file in _pickles(path):
            _walk(file, found)
    except Strange as strange:
        raise Strange(str(strange), found) from None
    except _DAMAGED:  # or bytes that are no pickle any more; torch will say so
        pass
    if refused := next((name for name in found if name in _REFUSED), None):
        raise Strange(f"asks for {refused}", found)
    return found


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """Every pickle of a file, at its beginning."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(MOST_PICKLES):
                yield file
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > path.stat().st_size + SPARE_BYTES:
                raise Strange("unfolds to more than it is")
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as inner:
                        yield inner


def _walk(file: IO[bytes], found: list[str]) -> None:
    """Follow one pickle to its end with sizes in the place of values; what it names goes to ``found``."""
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[Any, _Value] = {}
    strings = ["", ""]
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            found.append(str(argument).replace(" ", ".") if argument else ".".join(strings))
        elif isinstance(argument, str):
            strings = [strings[1], argument]
        if name.endswith("GET"):
            value = memo.get(argument, _Value())
            value.shared = True
            stack.append(value)
        elif name.endswith("PUT") or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1] or _Value()
        elif name == "MARK":
            stack.append(None)
        else:
            taken = _take(stack, [kind.name for kind in opcode.stack_before])
            size = 1 + sum(value.size for value in taken)
            if name in _APPENDING and taken:
                if taken[0].shared:
                    raise Strange("holds a list or dictionary within itself, or fills one after its use")
                taken[0].size = size
                stack.append(taken[0])
            else:
                stack.extend(_Value(size) for _ in opcode.stack_after)
            if size > MOST_UNFOLDED:
                raise Strange("repeats itself without end")


def _take(stack: list[_Value | None], kinds: list[str]) -> list[_Value]:
    """Take from the stack what an opcode takes, from below."""
    taken: list[_Value] = []
    if "stackslice" in kinds:
        while (value := stack.pop()) is not None:
            taken.append(value)
        kinds = kinds[: kinds.index("mark")]
    for _ in kinds:
        taken.append(stack.pop() or _Value())
    return taken[::-1]
