"""Why a file cannot be read as safetensors: empty, truncated, damaged, or something else altogether.

The library says "header too large" of a picture and of a zip archive alike. What a person can do differs: fetch a
truncated file again, look for another file where this one is foreign. Only read once the library has refused.
"""

from pathlib import Path

from pydantic_core import from_json

from saqcli.units import counted

MOST_HEADER = 100_000_000  # bytes; the library's own limit
AGAIN = "fetch or write the file again"
MODEL = "give the model.safetensors of a run directory, or, for float weights, MODEL --weights FILE"

_KINDS = {  # how files of other formats begin
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x1f\x8b": "a compressed file",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a pointer to a file that Git LFS has not fetched",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}


def describe_damage(path: Path, reason: str) -> str:
    """What is wrong with ``path``, which safetensors refused for ``reason``, and what to do; on one line."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(32)
            length = int.from_bytes(head[:8], "little")
            file.seek(8)
            header = file.read(min(length, MOST_HEADER))
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error}): check the file"
    if size == 0:
        return f"{path} is empty (0 bytes): {AGAIN}"
    for start, kind in _KINDS.items():
        if head.startswith(start):
            return f"{path} is {kind}, no safetensors file; nothing in it was run: {MODEL}"
    if size < 8:
        return f"{path} is truncated to {counted(size, 'byte')}: {AGAIN}"
    if length > MOST_HEADER or head[8:9] not in (b"{", b""):
        return f"{path} is no safetensors file: {MODEL}"
    if 8 + length > size:
        return f"{path} is truncated: it has {counted(size, 'byte')}, its header alone {8 + length}: {AGAIN}"
    promised = _end_of_tensors(header)
    if promised is None:
        return f"{path} is damaged, its header cannot be read ({reason}): {AGAIN}"
    there = size - 8 - length
    if there < promised:
        return f"{path} is truncated: of {promised} bytes of tensors it has {there}: {AGAIN}"
    return f"{path} is damaged ({reason}): {AGAIN}"


def _end_of_tensors(header: bytes) -> int | None:
    """Where the header says that the last tensor ends; None if it cannot be read."""
    try:
        entries = from_json(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return max(map(int, ends), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        return None
