"""Sharded data sets: tar archives of images, read by rank and worker.

The layout is timm's (``wds/DIR``): ``_info.json`` lists the files. ``webdataset`` opens files, URLs and commands and
unpacks the archives, as in timm. timm skips damaged data with a line in its log; here an archive that is truncated, or
does not match ``_info.json``, is refused.

timm's reader repeats images within a training pass, and its order depends on earlier draws. Here a pass gives each
image once for any number of workers, and its order follows from (seed, epoch, workers), so that an interrupted run
resumes with the same images. Each worker reads a contiguous range of whole batches and opens only the archives of that
range.
"""

import io
import json
import os
import random
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from saqcli.data.folders import IMAGE_EXTENSIONS
from saqcli.errors import DataError
from saqcli.units import counted

_INFO_FILES = ("_info.json", "info.json")
_PLAIN = re.compile(r"[\w.+=,@/-]+")  # a name without special characters of a shell
_REMEDY = "replace the file, or correct shard_lengths"


@dataclass(frozen=True)
class Part:
    """Images ``start`` to ``stop`` of an archive with ``images`` images; ``file`` is relative to the root."""

    file: str
    images: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class EncodedImage(io.BytesIO):
    """An encoded image with its name in the archive, for messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


def read_split(root: str, names: Sequence[str], title: str) -> tuple[str, tuple[Part, ...]]:
    """The first of the splits ``names`` that exists in ``root``, and its files.

    Args:
        root: folder or address of ``_info.json`` and its files.
        names: possible names of the split.
        title: name of the data set in messages.

    Raises:
        DataError: ``webdataset`` is not installed, or ``_info.json`` is missing, invalid or without such a split.
    """
    try:
        import webdataset  # noqa: F401
    except ImportError:
        raise DataError(
            f'{title} needs a package that is missing: pip install "saq[wds]", or give a folder of images'
        ) from None
    where, info = _read_info(root, title)
    splits = info.get("splits") if isinstance(info, dict) else None
    if not isinstance(splits, dict):
        raise DataError(f"{where} has no splits: write it in timm's layout (see docs/formats.md)")
    name = next((name for name in names if name in splits), None)
    if name is None:
        raise DataError(
            f"{where} has the splits {', '.join(map(str, splits)) or '(none)'}, but not {' or '.join(names)}: "
            "add it, or give other data"
        )
    return name, _parts(splits[name], f"the split {name} in {where}", root)


def read_part(root: str, part: Part) -> Iterator[tuple[EncodedImage, int]]:
    """The images of ``part`` and their labels.

    Raises:
        DataError: the file is missing or damaged, or does not match ``_info.json``.
    """
    address = os.path.join(root, part.file)
    with _opened(address) as archive:
        samples = _samples(archive, address)
        for place in range(part.images):
            sample = next(samples, None)
            if sample is None:
                ended = f"{address} ends after {counted(place, 'image')}, _info.json says {part.images}"
                raise DataError(f"{ended}{_status(archive)}: {_REMEDY}")
            if place >= part.start:
                yield _labelled(sample, address)
            if place + 1 == part.stop < part.images:
                return
        if next(samples, None) is not None:
            raise DataError(
                f"{address} holds more than the {counted(part.images, 'image')} of _info.json: {_REMEDY}"
            )


def _read_info(root: str, title: str) -> tuple[str, Any]:
    """Address and content of ``_info.json``."""
    failures = []
    for file in _INFO_FILES:
        address = os.path.join(root, file)
        try:
            with _opened(address) as stream:
                return address, json.loads(stream.read())
        except (DataError, ValueError, RecursionError) as error:
            failures.append(str(error) if isinstance(error, DataError) else f"{address} is not JSON")
    raise DataError(
        f"{title} cannot be opened ({failures[0].partition(': give')[0]}): give wds/DIR, where DIR holds tar files "
        "and their _info.json"
    )


def _parts(split: Any, where: str, root: str) -> tuple[Part, ...]:
    """The files of a split with their numbers of images."""
    fields = split if isinstance(split, dict) else {}
    files, lengths, total = (fields.get(key) for key in ("filenames", "shard_lengths", "num_samples"))
    if not (
        isinstance(files, list)
        and isinstance(lengths, list)
        and len(files) == len(lengths) > 0
        and all(isinstance(file, str) for file in files)
        and all(type(length) is int and length >= 0 for length in lengths)
        and total == sum(lengths) > 0
    ):
        raise DataError(
            f"{where} is inconsistent: filenames and shard_lengths must be lists of the same length, and num_samples "
            "the sum of shard_lengths"
        )
    if fields.get("alt_label"):
        raise DataError(f"{where} has labels under {fields['alt_label']!r}: give shards with .cls files")
    for file in files:
        if os.path.isabs(file) or ".." in file.split("/") or not _harmless(file, root):
            raise DataError(f"{where} names the file {file!r}: give plain names, relative to {root}")
    return tuple(Part(file, length, 0, length) for file, length in zip(files, lengths, strict=True))


def _harmless(file: str, root: str) -> bool:
    """Whether the file's name is safe in a shell, which runs a ``pipe:`` address."""
    return bool(_PLAIN.fullmatch(file)) or not root.startswith("pipe:")


@contextmanager
def _opened(address: str) -> Iterator[Any]:
    """A stream of bytes from a file, a URL or a ``pipe:``; the process behind it is terminated at the end."""
    from webdataset.gopen import gopen

    try:
        is_file = ":" not in address.partition("/")[0]
        if is_file and not stat.S_ISREG(os.stat(address).st_mode):
            raise OSError("it is not a file")
        stream = gopen(address)
    except Exception as error:  # handlers of webdataset may raise anything
        raise DataError(f"cannot open {address} ({_reason(error)}): give an existing address") from error
    try:
        yield stream
    except OSError as error:  # a command failed
        raise DataError(
            f"cannot read {address} ({_reason(error)}{_status(stream)}): give a readable address"
        ) from error
    finally:
        process = getattr(stream, "proc", None)
        if process is not None:
            process.terminate()
        with suppress(Exception):
            stream.close()


def _samples(archive: Any, address: str) -> Iterator[dict[str, Any]]:
    """The samples of an archive: bytes by extension, and ``__key__``."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    files = tar_file_expander([{"url": address, "stream": archive}])
    try:
        yield from group_by_keys(files)
    except Exception as error:  # tarfile and the decompressors may raise anything
        raise DataError(
            f"cannot read {address} ({_reason(error)}{_status(archive)}): replace the file"
        ) from error


def _labelled(sample: dict[str, Any], address: str) -> tuple[EncodedImage, int]:
    """Image and label of a sample."""
    name = f"{sample['__key__']} in {address}"
    content = next((sample[end[1:]] for end in IMAGE_EXTENSIONS if end[1:] in sample), None)
    if content is None or "cls" not in sample:
        held = ", ".join(f".{key}" for key in sample if not key.startswith("__"))
        raise DataError(f"{name} has {held}: a sample needs an image and its label (.cls)")
    try:
        return EncodedImage(content, name), int(sample["cls"])
    except ValueError:
        raise DataError(f"{name} has no number in its .cls file: write the label, counted from 0") from None


def _reason(error: BaseException) -> str:
    """The error in one line, without the streams and addresses that webdataset appends."""
    text = getattr(error, "strerror", None) or (error.args[0] if error.args else "") or type(error).__name__
    text = " ".join(str(text).partition("\n")[0].split())
    return "it is not a tar file" if text.startswith(("file could not be opened", "invalid header")) else text


def _status(stream: Any) -> str:
    """The exit status of the command of a ``pipe:`` or URL, if it failed."""
    process = getattr(stream, "proc", None)
    if process is None:
        return ""
    with suppress(Exception):
        process.wait(1)
    return f"; its command ended with {process.returncode}" if process.returncode else ""


SHUFFLE_BUFFER = 2048  # encoded images from which a worker draws the next one
IMAGES_PER_TURN = 8  # images that are drawn from a file before the next file


@dataclass
class Shards:
    """A split in tar files, or a part of it, as a stream of images.

    Attributes:
        root: folder or address of the files.
        parts: ranges of images to read.
        batch_size: images per batch; workers share the images by whole batches.
        shuffled: shuffle by (seed, epoch); otherwise the order depends on the number of workers only.
        drop_last: drop the last batch if it is short.
        seed: seed of the order.
        epoch: epoch of the next pass.
        share: (rank, number of processes) that read the images together. With ``drop_last`` all get the same number,
            and fewer images than processes are dropped; otherwise each gets whole batches, and no image is read twice.
    """

    root: str
    parts: tuple[Part, ...]
    batch_size: int = 1
    shuffled: bool = False
    drop_last: bool = False
    seed: int = 0
    epoch: int = 0
    share: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        """Images in one pass."""
        return self._own_range()[1]

    def _own_range(self) -> tuple[int, int]:
        """First image of this process, and their number."""
        total, (rank, count) = sum(map(len, self.parts)), self.share
        if self.drop_last:
            each = total // count
            return rank * each, each - each % self.batch_size
        batches = -(-total // self.batch_size)
        first, last = (min(total, batches * r // count * self.batch_size) for r in (rank, rank + 1))
        return first, last - first

    def set_epoch(self, count: int, /) -> None:
        """Set the epoch of the next pass, which determines its order."""
        self.epoch = count

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Do nothing: each worker gets its number from torch."""

    def draw(self, count: int, seed: int) -> "Shards":
        """``count`` images: the first ones of files drawn by ``seed``, a few from each in turn.

        A file may hold a single class, so many files are used; only their beginnings are read.
        """
        parts = _shuffled(self.parts, np.random.SeedSequence(seed))
        return self._split(parts, _in_turns([len(part) for part in parts], count))[0]

    def divide(self, count: int, seed: int) -> tuple["Shards", "Shards"]:
        """``count`` images, a proportional number from each file, and the rest; ``seed`` draws the order of files."""
        parts = _shuffled(self.parts, np.random.SeedSequence(seed))
        ends = np.cumsum([len(part) for part in parts])
        shares = np.diff(np.rint(ends * (count / ends[-1])).astype(int), prepend=0)
        return self._split(parts, shares.tolist())

    def _split(self, parts: Sequence[Part], taken: Sequence[int]) -> tuple["Shards", "Shards"]:
        """The first ``taken`` images of each part, and the rest."""
        pairs = list(zip(parts, taken, strict=True))
        first = [replace(part, stop=part.start + n) for part, n in pairs if n]
        rest = [replace(part, start=part.start + n) for part, n in pairs if n < len(part)]
        return replace(self, parts=tuple(first)), replace(self, parts=tuple(rest))

    def __iter__(self) -> Iterator[tuple[EncodedImage, int]]:
        """Each image of this worker once.

        Raises:
            DataError: a file is missing or damaged, or does not match ``_info.json``.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        parts = self.parts
        if self.shuffled:
            parts = _shuffled(parts, np.random.SeedSequence((self.seed, self.epoch)))
        begin, count = self._own_range()
        each, more = divmod(-(-count // self.batch_size), workers)
        first = worker * each + min(worker, more)
        last = first + each + (worker < more)
        mine = _cut(parts, begin + first * self.batch_size, begin + min(last * self.batch_size, count))
        images = chain.from_iterable(read_part(self.root, part) for part in mine)
        if not self.shuffled:
            return images
        seeds = np.random.SeedSequence((self.seed, self.epoch, self.share[0], worker))
        return _shuffled_images(images, random.Random(int(seeds.generate_state(1, np.uint64)[0])))


def _cut(parts: Sequence[Part], first: int, last: int) -> tuple[Part, ...]:
    """Images ``first`` to ``last`` of the concatenated ``parts``."""
    kept = []
    for part in parts:
        start, stop = max(first, 0), min(last, len(part))
        if start < stop:
            kept.append(replace(part, start=part.start + start, stop=part.start + stop))
        first, last = first - len(part), last - len(part)
    return tuple(kept)


def _in_turns(available: Sequence[int], count: int) -> list[int]:
    """The number of images from each file, ``count`` in total, taken ``IMAGES_PER_TURN`` at a time in rounds."""
    taken = [0] * len(available)
    left = min(count, sum(available))
    while left:
        for place, most in enumerate(available):
            given = min(IMAGES_PER_TURN, most - taken[place], left)
            taken[place] += given
            left -= given
    return taken


def _shuffled(parts: Sequence[Part], seeds: np.random.SeedSequence) -> tuple[Part, ...]:
    return tuple(parts[place] for place in np.random.default_rng(seeds).permutation(len(parts)))


def _shuffled_images(
    images: Iterator[tuple[EncodedImage, int]], rng: random.Random
) -> Iterator[tuple[EncodedImage, int]]:
    """All images, each drawn from a buffer of ``SHUFFLE_BUFFER`` images."""
    held: list[tuple[EncodedImage, int]] = []
    for image in images:
        if len(held) < SHUFFLE_BUFFER:
            held.append(image)
            continue
        place = rng.randrange(SHUFFLE_BUFFER)
        held[place], image = image, held[place]
        yield image
    rng.shuffle(held)
    yield from held
