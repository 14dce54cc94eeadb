"""What shells complete besides options and choices: models, runs and policies. Nothing here imports torch or timm."""

import csv
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from saqcli.runs.listing import FOLDER, LATEST, runs_in

MODEL_FILES = (".safetensors", ".onnx")
MOST_RUNS = 100  # the latest ones


def complete_model(incomplete: str) -> list[str]:
    """Networks whose name begins with ``incomplete``; without the library's prefix unless it is typed."""
    text = (files("saqcli.models") / "catalogue.csv").read_text(encoding="utf-8")
    names = [row["name"] for row in csv.DictReader(text.splitlines())]
    if "/" in incomplete:
        return [name for name in names if name.startswith(incomplete)]
    plain = dict.fromkeys(name.partition("/")[2] for name in names if not name.startswith("saq/"))
    libraries = dict.fromkeys(f"{name.partition('/')[0]}/" for name in names)
    own = [name for name in names if name.startswith("saq/")] if incomplete.startswith("s") else []
    return [name for name in (*libraries, *own, *plain) if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Run directories, newest first, and ``latest``; else the folders on the way to one."""
    above = os.path.dirname(incomplete)
    found = [str(path) for path in (*runs_in(FOLDER), *(runs_in(Path(above)) if above else ()))]
    names = [*found[:MOST_RUNS], *([LATEST] if found else []), *_paths(incomplete, ())]
    return list(dict.fromkeys(name for name in names if name.startswith(incomplete)))


def complete_source(incomplete: str) -> list[str]:
    """Runs, model files, and networks once a part of the name is typed."""
    names = [*complete_run(incomplete), *_paths(incomplete, MODEL_FILES)]
    return list(dict.fromkeys([*names, *(complete_model(incomplete) if incomplete else ())]))


def complete_policy(incomplete: str) -> list[str]:
    """Runs, which have a policy, and JSON files."""
    return list(dict.fromkeys([*complete_run(incomplete), *_paths(incomplete, (".json",))]))


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Folders, with a slash, and files with one of the ``suffixes``, whose path begins with ``incomplete``."""
    above = os.path.dirname(incomplete)
    try:
        entries = sorted(os.scandir(os.path.expanduser(above) or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        path = os.path.join(above, entry.name)
        if entry.name.startswith(".") or not path.startswith(incomplete):
            continue
        if entry.is_dir():
            yield f"{path}/"
        elif entry.name.endswith(suffixes):
            yield path
