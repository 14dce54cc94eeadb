"""The images of a run, for commands on the run that are given none."""

from pathlib import Path
from typing import Any

from saqcli.config import DataSection
from saqcli.errors import DataError
from saqcli.runs.directory import RunDirectory
from saqcli.serialization import named_path

NAMED_SETS = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")  # prefixes of timm's data sets


def is_named_set(data: str) -> bool:
    """Whether ``data`` is the name of a timm data set and not a folder."""
    return data.lower().startswith(NAMED_SETS) and not Path(data).exists()


def data_of_run(run: RunDirectory) -> DataSection:
    """The images that ``run`` was made with, and the settings of their loading, with paths that are valid here.

    Relative paths refer to the working directory of the run, or to the current one if they exist only there. How
    folders map to classes is recorded in the model, so the section names no files about classes.

    Raises:
        RunDirectoryError: the directory is damaged.
        DataError: the images are not there.
    """
    section, then = run.config().data, run.manifest().circumstances
    start = Path(then[0].directory) if then else Path.cwd()
    changes: dict[str, Any] = {"class_order": None, "class_map": None}
    for setting, text in (("path", section.path), ("calibration", section.calibration)):
        if text is None:
            continue
        if setting == "path" and is_named_set(text) and not (start / text).exists():
            changes[setting] = _stored_in(text, start)
            continue
        path = named_path(text)
        if start != Path.cwd() and (start / path).exists():
            path = start / path
        check_still_there(setting, path, str(run.path))
        changes[setting] = str(path)
    return section.model_copy(update=changes)


def _stored_in(data: str, start: Path) -> str:
    """The name of a timm data set with its storage, where that is relative to the folder ``start`` and still there.

    Without a storage, torch/ and tfds/ data are in the current folder, and wds/ data in the folder of their name.
    """
    name, _, root = data.partition("@")
    prefix, _, rest = name.partition("/")
    root = root or {"torch": ".", "tfds": ".", "wds": rest}.get(prefix.lower(), "")
    place = start / Path(root).expanduser()
    if start == Path.cwd() or not root or ":" in root or not place.exists():
        return data
    return f"{name}@{place}"


def check_still_there(setting: str, path: Path, run: str) -> None:
    """Check that the images of ``run`` exist, those of ``data.path`` or of ``data.calibration``.

    Raises:
        DataError: they do not; the message names the setting for their new place.
    """
    if not path.exists():
        what, place = ("images", "DIR") if setting == "path" else ("calibration images", "PATH")
        raise DataError(
            f"the {what} of {run} are no longer in {path.absolute()}: give their new place as `data.{setting}={place}`"
        )
