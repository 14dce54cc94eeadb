"""CIFAR's own pickles, opcode by opcode as Python 2 wrote the published ones (protocol 2, byte strings)."""

import struct
from pathlib import Path

import numpy as np


def text(value: bytes) -> bytes:
    if len(value) < 256:
        return b"U" + bytes([len(value)]) + value
    return b"T" + struct.pack("<i", len(value)) + value


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    return b"J" + struct.pack("<i", value)


def items(values: list[bytes]) -> bytes:
    return b"](" + b"".join(values) + b"e"


def dictionary(pairs: dict[bytes, bytes]) -> bytes:
    return b"\x80\x02}q\x01(" + b"".join(text(key) + value for key, value in pairs.items()) + b"u."


def array(pixels: np.ndarray) -> bytes:
    """An array of bytes, as numpy reduces it."""
    rows, columns = pixels.shape
    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t"
    kind = b"cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNN" + number(-1) * 2 + b"K\x00tb"
    shape = number(rows) + number(columns) + b"\x86"
    return made + b"(K\x01" + shape + kind + b"\x89" + text(pixels.tobytes()) + b"tb"


def batch(pixels: np.ndarray, labels: list[int], key: bytes = b"labels") -> bytes:
    names = [text(f"image_{index}.png".encode()) for index in range(len(labels))]
    return dictionary(
        {
            b"batch_label": text(b"testing batch 1 of 1"),
            key: items(list(map(number, labels))),
            b"data": array(pixels),
            b"filenames": items(names),
        }
    )


def write_cifar10(folder: Path, names: list[str], each: int = 4) -> np.ndarray:
    """Five batches and a test batch of ``each`` images; returns the pixels of the test batch, (N, 32, 32, 3)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for file in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (each, 3072), dtype=np.uint8)
        (folder / file).write_bytes(batch(pixels, [index % len(names) for index in range(each)]))
    labels = items([text(name.encode()) for name in names])
    meta = {b"num_cases_per_batch": number(10000), b"label_names": labels, b"num_vis": number(3072)}
    (folder / "batches.meta").write_bytes(dictionary(meta))
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
