"""Unusual image files are read, or named in one line; nothing hangs, runs code or warns."""

import gc
import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saqcli.data.batches import Loader
from saqcli.data.datasets import Split, open_split
from saqcli.data.images import LEFT_OUT, decode
from saqcli.data.loaders import make_loader
from saqcli.errors import ConfigError, DataError
from saqcli.models.preprocessing import Preprocessing
from tests.support.command_line import last_error, saq
from tests.support.digits import MODEL, float_options

SIDE = 32


def picture(side: int = SIDE) -> Image.Image:
    """A smooth image, so that JPEG nearly preserves it."""
    across = np.linspace(0, 255, side).astype(np.uint8)
    return Image.fromarray(np.stack(np.broadcast_arrays(across, across[:, None], np.uint8(128)), axis=-1))


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, kind, **options)
    return file.getvalue()


def animated(kind: str) -> bytes:
    return encoded(kind, save_all=True, append_images=[picture().rotate(90)])


def ycck() -> bytes:
    """A CMYK file whose Adobe marker claims YCCK; it decodes to another picture."""
    content = bytearray(encoded("jpeg", picture().convert("CMYK")))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def with_exif(content: bytes) -> bytes:
    """A JPEG with these bytes as EXIF."""
    file, segment = encoded("jpeg"), b"Exif\0\0" + content
    return file[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + file[2:]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file that claims that size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file = encoded("png")
    return file[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + file[33:]


ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6

READABLE: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded("jpeg"),
    "progressive": lambda: encoded("jpeg", progressive=True),
    "cmyk": lambda: encoded("jpeg", picture().convert("CMYK")),
    "ycck": ycck,
    "turned by exif": lambda: encoded("jpeg", exif=ORIENTED),
    "exif of nothing": lambda: with_exif(b""),
    "exif of noise": lambda: with_exif(b"II*\0" + b"\xff" * 60),
    "exif without end": lambda: with_exif(b"MM\0*\0\0\0\x08\0\x05\x01\x12"),
    "mpo": lambda: animated("mpo"),
    "gif": lambda: animated("gif"),
    "webp": lambda: animated("webp"),
    "apng": lambda: animated("png"),
    "transparent palette": lambda: encoded("png", picture().quantize(16), transparency=bytes(16)),
    "transparent": lambda: encoded("png", picture().convert("RGBA")),
    "16 bits": lambda: encoded(
        "png", Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)
    ),
    "float": lambda: encoded("tiff", picture().convert("F")),
}
GREY = ("16 bits", "float")
OTHER_COLOURS = ("ycck", "transparent palette", "gif")

UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (lambda path: path.write_bytes(b""), "it is not an image"),
    "text": (lambda path: path.write_text("hello"), "it is not an image"),
    "a program": (
        lambda path: path.write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
        ),
        "it is not an image",
    ),
    "half a jpeg": (lambda path: path.write_bytes(encoded("jpeg")[:-200]), "truncated|Truncated"),
    "half a png": (lambda path: path.write_bytes(encoded("png")[:90]), "truncated|broken|unrecognized"),
    "huge": (lambda path: path.write_bytes(png_of_size(20_000, 20_000)), "exceeds limit"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere.png"), "it is a broken link"),
    "a pipe": (lambda path: os.mkfifo(path), "it is a pipe or a device"),
}
if os.name == "posix" and os.geteuid() != 0:  # root can read everything
    UNREADABLE["forbidden"] = (
        lambda path: (path.write_bytes(encoded("png")), path.chmod(0)),
        "Permission denied",
    )


def load(split: Split, workers: int = 0, **options: bool) -> Loader:
    plain = Preprocessing((3, SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)
    training = options.pop("training", False)
    return make_loader(
        split, plain, batch_size=1, training=training, workers=workers, device=torch.device("cpu"), seed=0
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with one valid image each."""
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "good.png").write_bytes(encoded("png"))
    return tmp_path


def opened(folder: Path, bad_images: str = "refuse") -> Split:
    return open_split(str(folder), "val", num_classes=2, bad_images=bad_images)  # type: ignore[arg-type]


def test_every_image_kind_is_read_silently(folder: Path) -> None:
    """The first frame, as stored; a warning would be an error here."""
    for name, content in READABLE.items():
        (folder / "val" / "cat" / f"{name}.jpg").write_bytes(content())
        (folder / "val" / "cat" / "good.png").unlink(missing_ok=True)
        (image, label), _ = load(opened(folder))
        assert label == 0
        expected = picture().convert("L").convert("RGB") if name in GREY else picture()
        if name not in OTHER_COLOURS:
            difference = image[0] - torch.from_numpy(np.asarray(expected) / 255).permute(2, 0, 1)
            assert difference.abs().max() < 0.1, name
        (folder / "val" / "cat" / f"{name}.jpg").unlink()


def test_large_images_are_read_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE)
    assert decode(io.BytesIO(encoded("png", picture(SIDE + 1)))).size == (SIDE + 1, SIDE + 1)
    with pytest.raises(Image.DecompressionBombError):
        decode(io.BytesIO(encoded("png", picture(2 * SIDE))))


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes and links")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_unreadable_image_is_named_or_skipped(folder: Path, workers: int) -> None:
    for name, (make, reason) in UNREADABLE.items():
        path = folder / "val" / "cat" / f"{name}.jpg"
        make(path)
        with pytest.raises(
            DataError, match=f"cannot read {path} .*({reason}).*: replace or remove it"
        ) as caught:
            list(load(opened(folder), workers))
        assert "\n" not in str(caught.value)
        labels = [int(label) for _, label in load(opened(folder, "skip"), workers)]
        assert sorted(labels) == [LEFT_OUT, 0, 1]
        assert all(label >= 0 for _, label in load(opened(folder, "skip"), workers, training=True))
        path.unlink()


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes and links")
def test_command_counts_skipped_images(digits: Path, tmp_path: Path) -> None:
    for label in range(10):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        (tmp_path / "images" / str(label) / "good.png").write_bytes(encoded("png"))
    for name, (make, _) in UNREADABLE.items():
        make(tmp_path / "images" / "3" / f"{name}.jpg")
    options = [MODEL, *float_options(digits, tmp_path / "images"), "--json"]
    refused, skipped = saq("eval", *options), saq("eval", *options, "--bad-images", "skip")
    assert refused.exit_code == 1
    assert "cannot read" in last_error(refused)
    assert skipped.exit_code == 0
    assert skipped.stderr == ""
    assert f'"skipped": {len(UNREADABLE)}' in skipped.stdout
    assert '"images": 10' in skipped.stdout


@pytest.mark.parametrize("workers", [0, 2])
def test_image_deleted_during_run_is_reported(folder: Path, workers: int) -> None:
    strict, lenient = opened(folder), opened(folder, "skip")
    (folder / "val" / "dog" / "good.png").unlink()
    with pytest.raises(DataError, match=r"good.png \(it existed when the run started\)"):
        list(load(strict, workers))
    assert [int(label) for _, label in load(lenient, workers)] == [0, LEFT_OUT]


@pytest.mark.skipif(sys.platform == "win32", reason="no links")
def test_misleading_folders_are_reported(folder: Path) -> None:
    (folder / "val" / "cat" / "more.png").mkdir()  # a folder despite its name
    (folder / "val" / "cat" / "more.png" / "2.png").write_bytes(encoded("png"))
    (folder / "val" / "dog" / "far").symlink_to(folder / "val" / "cat")
    assert opened(folder).images == 5
    (folder / "val" / "cat" / "more.png" / "back").symlink_to(folder / "val" / "cat")
    with pytest.raises(DataError, match="back is a link to one of its parent folders: remove it"):
        opened(folder)
    with pytest.raises(ConfigError, match="is not a path"):
        opened(Path("x" * 5000))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_worker_is_reported_promptly(folder: Path, training: bool) -> None:
    for number in range(200):
        (folder / "val" / "cat" / f"{number}.png").write_bytes(encoded("png"))
    before = set(multiprocessing.active_children())
    batches = iter(load(opened(folder), 2, training=training))
    next(batches)
    victim = next(child for child in multiprocessing.active_children() if child not in before)
    started = time.monotonic()
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"the worker processes that read .*val died.* `data.workers=0`"):
        list(batches)
    assert time.monotonic() - started < 60


def delay_start(begin: Callable[[int], None], started: Any, worker: int) -> None:
    """Runs first in a worker: waits before, or afterwards until all workers have started."""
    if started is None:
        time.sleep(0.5)
    begin(worker)
    if started is not None:
        started.wait(60)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
@pytest.mark.parametrize("beginning", [False, True])
def test_workers_survive_group_signals(folder: Path, beginning: bool) -> None:
    """As from Ctrl-C in a terminal, or from torchrun: the main process decides when workers end."""
    for number in range(200):
        (folder / "val" / "cat" / f"{number}.png").write_bytes(encoded("png"))
    started = None if beginning else multiprocessing.Barrier(3)
    loader = load(opened(folder), 2, training=True)
    inner = loader._inner
    inner.worker_init_fn = partial(delay_start, inner.worker_init_fn, started)
    before = set(multiprocessing.active_children())
    batches = iter(inner)
    readers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(readers) == 2
    if started is not None:
        started.wait(60)
    for reader in readers:
        assert reader.pid is not None
        os.kill(reader.pid, signal.SIGINT)
        os.kill(reader.pid, signal.SIGHUP)
        os.kill(reader.pid, signal.SIGTERM)

    assert sum(len(labels) for _, labels in batches) >= 200
    for reader in readers:
        reader.join(60)
        assert reader.exitcode is not None


@pytest.mark.parametrize("training", [False, True])
def test_workers_exit_with_their_loader(folder: Path, training: bool) -> None:
    """Without garbage collection, which would take seconds per worker and might leave workers behind."""
    before = set(multiprocessing.active_children())
    loader = load(opened(folder), 2, training=training)
    batches = iter(loader)
    next(batches)
    readers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(readers) == 2
    gc.disable()
    try:
        del batches, loader
        for reader in readers:
            reader.join(60)
    finally:
        gc.enable()
    assert [reader.exitcode for reader in readers] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_handle_signals_with_every_start_method(method: str) -> None:
    code = (
        f"import multiprocessing, sys, pytest; multiprocessing.set_start_method({method!r}); "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    test = f"{__file__}::{test_workers_survive_group_signals.__name__}"
    command = [sys.executable, "-c", code, "-n", "0", "-q", "-p", "no:cacheprovider", f"{test}[True]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout
