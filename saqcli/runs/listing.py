"""Runs that are not named: the runs in a folder, the latest of them, and the one that a command takes."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from saqcli.errors import RunDirectoryError, SaqError

FOLDER = Path("runs")  # where runs go by default
LATEST = "latest"
DEPTH = 2  # levels that are looked through: ``runs/demo/quantized`` is the run of ``saq demo``

Holding = Literal["a model", "bits", "a finished run", "any"]  # what a command needs of a run


class Taken(NamedTuple):
    """The run that a command takes.

    Attributes:
        text: its directory, or the text as it was given.
        note: which run was taken and why, for the user; None if the text names it.
    """

    text: str
    note: str | None = None


def runs_in(folder: Path) -> list[Path]:
    """The run directories in ``folder`` and in its folders that are none, the last one that was written to first.

    Folders that cannot be read hold none.
    """
    found = sorted(_with_times(folder, DEPTH), key=lambda each: (-each[0], each[1]))
    return [path for _, path in found]


def _with_times(folder: Path, depth: int) -> Iterator[tuple[float, Path]]:
    """Run directories at most ``depth`` levels below ``folder``, with the times of their manifests."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            try:
                yield os.stat(path / "manifest.json").st_mtime, path
            except OSError:
                if depth > 1 and entry.is_dir():
                    yield from _with_times(path, depth - 1)


def take_run(
    text: str | None,
    needs: Holding,
    folder: Path = FOLDER,
    is_model: Callable[[str], bool] = lambda name: False,
) -> Taken:
    """The run that ``text`` refers to.

    Args:
        text: a path; ``latest`` or None for the latest run in ``folder`` that holds what is needed. A folder that is no
            run and contains one refers to that. Any other text is returned as it is.
        needs: what the command needs of the latest run; runs without it are passed over.
        folder: of the latest run.
        is_model: whether a text is the name of a model, which it then is, even if there is a folder of that name.

    Raises:
        RunDirectoryError: the latest run is wanted, and there is none.
    """
    if text is None or (text == LATEST and not Path(text).exists()):
        return _latest(needs, folder)
    path = Path(text).expanduser()
    if not path.is_dir() or (path / "manifest.json").is_file() or is_model(text):
        return Taken(text)
    if len(inside := runs_in(path)) == 1:
        return Taken(str(inside[0]), f"using {inside[0]}, the only run in {path}")
    return Taken(text)


def _latest(needs: Holding, folder: Path) -> Taken:
    there = runs_in(folder)
    for place, path in enumerate(there):
        if _holds(path, needs):
            newer = f", since {there[0]} is newer and holds none" if place and needs == "a model" else ""
            what = "run" if needs in ("a finished run", "any") else f"run with {needs}"
            return Taken(str(path), f"using {path}, the latest {what}{newer}")
    if not there:
        missing = f"there is no run in {folder}{os.sep}"
    else:
        from saqcli.runs.directory import RunDirectory

        state = ""
        with suppress(SaqError):
            run = RunDirectory.open(there[0])
            state = f", a run of `saq {run.verb}` which {run.status_text()}"
        what = "is finished" if needs == "a finished run" else f"holds {needs}"
        missing = f"no run in {folder}{os.sep} {what} (the latest is {there[0]}{state})"
    raise RunDirectoryError(f"{missing}: give a run directory, or make one with `saq quantize`")


def _holds(path: Path, needs: Holding) -> bool:
    from saqcli.runs.directory import RunDirectory  # here, since it needs torch, and completion lists runs

    try:
        run = RunDirectory.open(path)
        if needs == "a model":
            return run.verb == "quantize" and run.safetensors_path.is_file()
        if needs == "bits":
            return run.policy_path.is_file()
        return needs == "any" or run.manifest().status == "finished"
    except SaqError:
        return False
