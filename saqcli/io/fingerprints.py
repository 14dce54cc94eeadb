"""Which images a split holds, as a line of text: a run that goes on must go on with the same ones.

No file is opened or looked at, so that a million names take seconds; an image that was replaced under its name is
not noticed.
"""

import hashlib
import os
import re
from collections.abc import Iterator

from saqcli.errors import DataError
from saqcli.io.data import Split, sharded
from saqcli.io.images import ImageSet


def fingerprint(split: Split) -> str:
    """``COUNT:SHA256`` over what is known of the images of ``split``, in order.

    Of a folder these are file names, relative to it, and labels, so that a data set may be moved; of shards the names
    of the files and how many images each holds; of other named sets the name, without where it is stored, their
    number, and the labels where they are known.
    """
    hashed = hashlib.sha256()
    for line in _lines(split):
        hashed.update(line.encode(errors="surrogateescape") + b"\n")
    return f"{split.images}:{hashed.hexdigest()}"


def check_fingerprint(kept: str, split: Split, called: str, then: str = "the run started with") -> None:
    """Refuse other images than those that a run started with.

    Args:
        kept: what ``fingerprint`` gave then.
        split: as it is now.
        called: the split's name in the message, such as ``training``.
        then: who saw the others, in the message.

    Raises:
        DataError: they differ.
    """
    if fingerprint(split) == kept:
        return
    before = kept.partition(":")[0]
    count = int(before) if before.isdecimal() else -1
    counts = f"{count:,} expected, {split.images:,} found"
    if count == split.images:
        counts = f"{count:,} expected and found, with other names or labels"
    raise DataError(
        f"the {called} images in {split.name} are not those that {then} ({counts}): "
        "put them back, or start anew with --overwrite"
    )


def _lines(split: Split) -> Iterator[str]:
    """What the fingerprint is of; NUL, which no name holds, stands between name and number."""
    for label, meant in sorted((split.dataset.relabel or {}).items()):
        yield f"\0{label}\0{meant}"
    if (shards := sharded(split)) is not None:
        for part in shards.parts:
            yield f"{part.file}\0{part.images}\0{part.start}\0{part.stop}"
        return
    dataset = split.dataset
    if isinstance(dataset, ImageSet) and isinstance(dataset.source, list):
        folder = os.path.join(split.name, "")  # the split is called by it
        for file, label in dataset.source:
            yield f"{file.removeprefix(folder)}\0{label}".replace(os.sep, "/")
        return
    yield re.sub(r"@.*(?= \(\w+\)$)", "", split.name)
    yield str(split.images)
    if isinstance(dataset, ImageSet) and dataset.labels is not None:
        yield from map(str, dataset.labels)
