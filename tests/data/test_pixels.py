"""Pixel values of any range are scaled correctly or refused, never black or white without notice."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saqcli.data.datasets import open_split
from saqcli.data.images import decode
from saqcli.errors import DataError
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options

MakeClasses = Callable[[Path, Mapping[str, int]], Path]

SIDE = 8
GREY = np.linspace(0, 250, SIDE * SIDE).astype(np.uint8).reshape(SIDE, SIDE)
COLOUR = np.stack([GREY, GREY.T, 250 - GREY], axis=-1)


def stored(pixels: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def read(content: bytes, mode: str = "L") -> Any:
    return np.asarray(decode(io.BytesIO(content), mode))


def tiff(
    pixels: Any, bits: int, sample_format: int = 1, photometric: int = 1, order: str = "<", width: int = 0
) -> bytes:
    """An uncompressed TIFF of these bytes, in forms that Pillow does not write."""
    shape = pixels.shape
    samples = shape[2] if len(shape) == 3 else 1
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    entries = {
        256: (3, [width or shape[1]]),
        257: (3, [shape[0]]),
        258: (3, [bits] * samples),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, [8]),
        277: (3, [samples]),
        278: (3, [shape[0]]),
        279: (4, [len(data)]),
        339: (3, [sample_format] * samples),
    }
    end = "little" if order == "<" else "big"
    directory, extra = len(entries).to_bytes(2, end), b""
    begin = 8 + len(data)
    for tag, (kind, values) in entries.items():
        packed = b"".join(value.to_bytes(2 if kind == 3 else 4, end) for value in values)
        directory += tag.to_bytes(2, end) + kind.to_bytes(2, end) + len(values).to_bytes(4, end)
        if len(packed) > 4:
            directory += (begin + 2 + 12 * len(entries) + 4 + len(extra)).to_bytes(4, end)
            extra += packed
        else:
            directory += packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + begin.to_bytes(4, end)
    return head + data + directory + b"\0" * 4 + extra


EQUAL_TO_GREY: dict[str, bytes] = {
    "8 bits in 32": stored(GREY.astype(np.int32), "tiff"),
    "16 bits in 32": stored(GREY.astype(np.int32) * 257, "tiff"),
    "8 bits in unsigned 32": tiff(GREY.astype(np.uint32), 32),
    "8 bits in signed 32, other byte order": tiff(GREY.astype(np.int32), 32, 2, order=">"),
    "8 bits in signed 16": tiff(GREY.astype(np.int16), 16, 2),
    "15 bits in signed 16": tiff(GREY.astype(np.int16) * 128, 16, 2),
    "16-bit TIFF": stored(GREY.astype(np.uint16) * 257, "tiff"),
    "16-bit TIFF, other byte order": tiff(GREY.astype(np.uint16) * 257, 16, order=">"),
    "16-bit TIFF, white is zero": tiff(65535 - GREY.astype(np.uint16) * 257, 16, photometric=0),
    "16-bit PNG": stored(GREY.astype(np.uint16) * 257, "png"),
    "16-bit PGM": b"P5 8 8 65535\n" + (GREY.astype(">u2") * 257).tobytes(),
    "floats to 1": stored(GREY.astype(np.float32) / 255, "tiff"),
    "floats to 255": stored(GREY.astype(np.float32), "tiff"),
    "floats, other byte order": tiff(GREY.astype(np.float32) / 255, 32, 3, order=">"),
    "floats, white is zero": tiff((1 - GREY / 255).astype(np.float32), 32, 3, photometric=0),
    "grey and transparency": stored(Image.fromarray(GREY).convert("LA"), "png"),
}


@pytest.mark.parametrize("kind", EQUAL_TO_GREY)
def test_wide_integers_are_scaled_by_range(kind: str) -> None:
    assert np.array_equal(read(EQUAL_TO_GREY[kind]), GREY)
    assert np.array_equal(read(EQUAL_TO_GREY[kind], "RGB"), np.stack([GREY] * 3, axis=-1))


def test_twelve_bits_scale_to_eight() -> None:
    twelve = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65
    left, right = twelve.reshape(-1, 2).T
    packed = np.stack([left >> 4, ((left & 15) << 4) | (right >> 8), right & 255], axis=-1).astype(np.uint8)
    assert np.array_equal(read(tiff(packed.reshape(8, 12), 12, width=8)), twelve >> 4)


@pytest.mark.parametrize(
    "pixels", [np.zeros((8, 8), np.uint16), np.zeros((8, 8), np.int32), np.zeros((8, 8), np.float32)]
)
def test_black_stays_zero_at_any_range(pixels: Any) -> None:
    assert not read(stored(pixels, "tiff")).any()


def test_floats_may_exceed_one_by_rounding() -> None:
    assert read(stored(np.array([[0, 1.00001]], np.float32), "tiff")).tolist() == [[0, 255]]


AMBIGUOUS: dict[str, tuple[bytes, str]] = {
    "more than 16 bits": (
        stored(GREY.astype(np.int32) * 70_000, "tiff"),
        "is 1.75e.07, so the value of white",
    ),
    "negative": (stored(GREY.astype(np.int32) - 100, "tiff"), "value is -100"),
    "12 bits in 32": (stored(GREY.astype(np.int32) * 16, "tiff"), "largest value is 4000 of 65535"),
    "12 bits in 16": (stored(GREY.astype(np.uint16) * 16, "tiff"), "largest value is 4000 of 65535"),
    "8 bits in 16": (stored(GREY.astype(np.uint16), "png"), "largest value is 250 of 65535"),
    "a mask": (stored((GREY > 9).astype(np.int32), "tiff"), "largest value is 1 of 255"),
    "floats to 10": (stored(GREY.astype(np.float32) / 25, "tiff"), "largest value is 10 of 255"),
    "floats to 1000": (stored(GREY.astype(np.float32) * 4, "tiff"), "is 1000, so the value of white"),
    "floats below zero": (stored(GREY.astype(np.float32) - 1, "tiff"), "value is -1"),
    "small floats": (stored(GREY.astype(np.float32) / 25_000, "tiff"), "largest value is 0.01 of 1"),
    "NaN": (stored(np.where(GREY > 9, np.nan, GREY).astype(np.float32), "tiff"), "NaN or infinite"),
    "signed 8 bits": (tiff(GREY, 8, 2), "signed"),
    "8 bits in 16-bit colours": (
        tiff(COLOUR.astype(np.uint16), 16, photometric=2),
        "16-bit colours are below 4096",
    ),
    "floats in colour": (tiff(COLOUR.astype(np.float32), 32, 3, photometric=2), "this kind of TIFF"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_unknown_range_is_refused(kind: str, tmp_path: Path, make_classes: MakeClasses) -> None:
    content, reason = AMBIGUOUS[kind]
    path = make_classes(tmp_path, {"cat": 1}) / "cat" / "0.png"
    path.write_bytes(content)
    strict = open_split(str(tmp_path), "val", num_classes=1)
    with pytest.raises(DataError, match=f"cannot read {path} .*{reason}.*`data.bad_images=skip`"):
        strict.dataset[0]


def png16(pixels: Any) -> bytes:
    """A 16-bit colour PNG, which Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "content",
    [
        png16(COLOUR.astype(np.uint16) * 257),
        tiff(COLOUR.astype(np.uint16) * 257, 16, photometric=2),
        tiff(COLOUR.astype(np.uint16) * 257, 16, photometric=2, order=">"),
        b"P6 8 8 65535\n" + (COLOUR.astype(">u2") * 257).tobytes(),
    ],
)
def test_rgb16_keeps_the_high_byte(content: bytes) -> None:
    assert np.array_equal(read(content, "RGB"), COLOUR)


@pytest.mark.parametrize(
    "content", [png16(COLOUR.astype(np.uint16)), b"P6 8 8 65535\n" + COLOUR.astype(">u2").tobytes()]
)
def test_dark_rgb16_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="below 4096 of 65535"):
        read(content, "RGB")


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_pillow_mode_is_converted(mode: str) -> None:
    shown = Image.fromarray(
        COLOUR if mode in ("RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB") else GREY
    )
    if mode == "1":
        shown = shown.point(lambda value: 255 * (value > 99))
    between = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, "RGB" if mode == "LAB" else shown.mode)
    image = shown.convert(between).convert(mode)
    for colours in ("RGB", "L"):
        difference = np.asarray(decode(image, colours)).astype(int) - np.asarray(shown.convert(colours))
        assert abs(difference).mean() < 4, colours


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1],
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: a.T[::-1],
    9: lambda a: a,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_exif_orientation_is_applied_on_request(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = (
        {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "jpeg" else {}
    )
    content = stored(Image.fromarray(GREY[:5]), kind, exif=exif, **options)
    plain, turned = (np.asarray(decode(io.BytesIO(content), "L", exif_transpose=on)) for on in (False, True))
    assert plain.shape == (5, 8)
    assert np.array_equal(turned, TURNS[orientation](plain))


def test_tiff_is_rotated_once() -> None:
    content = stored(Image.fromarray(GREY[:5]), "tiff", tiffinfo={0x0112: 6})
    plain, turned = (np.asarray(decode(io.BytesIO(content), "L", exif_transpose=on)) for on in (False, True))
    assert np.array_equal(turned, plain)
    assert plain.shape == (8, 5)  # by Pillow, as in timm and torchvision


def test_broken_exif_is_ignored() -> None:
    content = stored(Image.fromarray(GREY), "jpeg", exif=b"Exif\0\0II*\0" + b"\xff" * 60)
    assert decode(io.BytesIO(content), "L", exif_transpose=True).size == (8, 8)


def test_accuracy_ignores_storage_format(digits: Path, tmp_path: Path) -> None:
    """Digits as 8-bit PNG, as TIFF of 32-bit integers and floats, and rotated with EXIF orientation."""
    forms: dict[str, Callable[[Any], tuple[Any, str, dict[str, Any]]]] = {
        "int": lambda a: (a.astype(np.int32), "tif", {}),
        "float": lambda a: (a.astype(np.float32) / 255, "tif", {}),
        "turned": lambda a: (a[::-1, ::-1].copy(), "png", {"exif": TURNED}),
    }
    for path in sorted((digits / "few" / "val").rglob("*.png")):
        pixels = np.asarray(Image.open(path))
        for form, make in forms.items():
            stored_pixels, ending, options = make(pixels)
            copy = (tmp_path / form / path.relative_to(digits / "few")).with_suffix(f".{ending}")
            copy.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(stored_pixels).save(copy, **options)

    def top1(data: Path, *options: str) -> float:
        return float(answer("eval", MODEL, *float_options(digits, data), *options)["top1"])

    expected = top1(digits / "few")
    assert expected > 80
    assert top1(tmp_path / "int") == top1(tmp_path / "float") == expected
    assert top1(tmp_path / "turned") < expected - 20
    assert top1(tmp_path / "turned", "--exif-transpose") == expected

    first = next((tmp_path / "int").rglob("*.tif"))
    Image.fromarray(np.asarray(Image.open(first)) * 1_000_000).save(first)
    refused = saq("eval", MODEL, *float_options(digits, tmp_path / "int"), "--quiet")
    assert refused.exit_code == 1
    assert str(first) in last_error(refused)
    skipped = answer("eval", MODEL, *float_options(digits, tmp_path / "int"), "--bad-images", "skip")
    assert skipped["skipped"] == 1


TURNED = Image.Exif()
TURNED[0x0112] = 3
