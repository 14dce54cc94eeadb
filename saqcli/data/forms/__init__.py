"""Data sets in other forms than class folders: tables, archives, parquet and arrow files, CIFAR's pickles.

A form is recognized by the names of files, before any is opened, and opened as ``Labelled`` images. What is inside is
untrusted: sizes are bounded before memory is taken, names are never written to, and no code is run.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from saqcli.data.forms.arrow import find_arrow, open_arrow
from saqcli.data.forms.cifar import find_cifar, open_cifar
from saqcli.data.forms.labelled import Labelled
from saqcli.data.forms.packed import find_archive, open_archive
from saqcli.data.forms.table import find_table, open_table


def find_form(data: Path, split: str, *, dead_images: bool = False) -> Callable[[], Labelled] | None:
    """How to open the ``split`` of ``data``; None if it is a folder of class folders, or nothing.

    Args:
        data: a folder or a file.
        split: ``train``, ``val`` (also validation or test), or another name.
        dead_images: whether a table may name files that do not exist, which are skipped when they are read.

    Raises:
        DataError: the form is known, and there is no such split.
    """
    if (cifar := find_cifar(data)) is not None:
        return partial(open_cifar, cifar, split)
    if (files := find_arrow(data, split)) is not None:
        return partial(open_arrow, files, split)
    if (archive := find_archive(data, split)) is not None:
        return partial(open_archive, archive, split)
    if (table := find_table(data, split)) is not None:
        root = data if data.is_dir() else data.parent
        return partial(open_table, table, split, root=root, dead_images=dead_images)
    return None
