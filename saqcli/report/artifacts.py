"""Files that later commands add to a finished run: under its lock, with hashes in the manifest, and on its page."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saqcli.errors import RunDirectoryError
from saqcli.progress import Progress
from saqcli.report.page.page import try_page
from saqcli.runs.directory import RunDirectory
from saqcli.serialization import make_folder


@contextmanager
def adding_to_run(path: Path, verdict: Path, progress: Progress) -> Iterator[None]:
    """Within the context, a file and its verdict are written, perhaps among the artifacts of a finished run.

    That run is locked, its manifest gets the hashes of both, and its page, if it has one, shows them.

    Raises:
        RunDirectoryError: another process is using the run.
        CannotWrite: the folder of ``path`` cannot be created.
    """
    folder, run = path.resolve().parent, None
    with suppress(RunDirectoryError):  # no run, or the manifest of another tool
        found = RunDirectory.open(folder.parent)
        run = found if folder.name == "artifacts" and found.manifest().status == "finished" else None
    if run is None:
        make_folder(path.parent)
        yield
        return
    with run.adding(path, verdict):
        yield
    if run.page_path.is_file():
        try_page(folder.parent, progress)
