"""Safetensors files split and joined with only JSON and bytes, including the hash.

A slow reference of the exporter, and the tool of an attacker.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def split(raw: bytes) -> tuple[Json, bytes]:
    """Header and data."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join(header: Json, data: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def entry_of(header: Json) -> Json:
    """The entry in the metadata."""
    entry: Json = json.loads(header["__metadata__"]["saq"])
    return entry


def sha256_of(header: Json, data: bytes) -> str:
    """The hash as docs/formats.md defines it."""
    text = header["__metadata__"]["saq"]
    digest = hashlib.sha256(text.replace(json.loads(text)["sha256"], "0" * 64, 1).encode())
    for name in sorted(set(header) - {"__metadata__"}):
        start, end = header[name]["data_offsets"]
        line = json.dumps([name, header[name]["dtype"], header[name]["shape"], end - start])
        digest.update(f"\n{line}\n".encode() + data[start:end])
    return digest.hexdigest()


def sealed(header: Json, data: bytes, entry: Any) -> bytes:
    """A file with ``entry`` in its metadata and the matching hash, where there is a place for one."""
    text = json.dumps(entry)
    if isinstance(entry, dict) and "sha256" in entry:
        entry = {**entry, "sha256": "0" * 64}
        header = {**header, "__metadata__": {"saq": json.dumps(entry)}}
        text = json.dumps({**entry, "sha256": sha256_of(header, data)})
    return join({**header, "__metadata__": {"saq": text}}, data)


def with_metadata(raw: bytes, change: Callable[[Json], object]) -> bytes:
    """``raw`` with other metadata and a matching hash."""
    header, data = split(raw)
    entry = entry_of(header)
    change(entry["facts"])
    return sealed(header, data, entry)


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path
