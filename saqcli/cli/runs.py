"""``saq runs``: the runs of a folder, one of them in full, a comparison of two, and their removal."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from saqcli.cli import options as o
from saqcli.cli.completion import complete_run
from saqcli.cli.console import print_json, reporting
from saqcli.errors import ConfigError

ACTIONS = ("list", "show", "rm", "compare")


@reporting
def runs_command(
    action: Annotated[
        str | None,
        typer.Argument(
            metavar="ACTION",
            help="What to do: list (the default), show one, rm (remove) some, or compare two",
            autocompletion=lambda: list(ACTIONS),
        ),
    ] = None,
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN...",
            autocompletion=complete_run,
            help="Run directories, or `latest`; for list, folders of runs [default: runs/]",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking")] = False,
    json_output: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """List the runs in a folder, show or compare them, or remove them: network, bits, top-1, BOPs, state, age.

    The last one that was written to comes first.

    Example: `saq runs`

    Example: `saq runs show latest`

    Example: `saq runs compare runs/resnet18-34g runs/resnet18-w4a4`

    Example: `saq runs rm runs/resnet18-w4a4`
    """
    if action is not None and action not in ACTIONS:
        hint = f"`saq runs list {action}`" if Path(action).is_dir() else " or ".join(ACTIONS)
        raise ConfigError(f"ACTION {action} is not known: give {hint}")
    if yes and action != "rm":
        raise ConfigError("--yes belongs to `saq runs rm`: remove it")
    given = runs or []
    if action in (None, "list"):
        _list(given, json_output=json_output)
    elif action == "show":
        _show(given or ["latest"], json_output=json_output)
    elif action == "compare":
        _compare(given, json_output=json_output)
    else:
        _remove(given, yes=yes, json_output=json_output)


def _taken(text: str) -> Path:
    """The run directory that ``text`` refers to.

    Raises:
        RunDirectoryError: there is none.
    """
    from saqcli.api.sources import find_source
    from saqcli.runs.listing import take_run

    found = find_source(take_run(text, "any").text, ("run",), "RUN")
    assert found.path is not None
    return found.path


def _list(folders: list[str], *, json_output: bool) -> None:
    from saqcli.runs.listing import FOLDER, runs_in
    from saqcli.runs.summary import summarize

    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"there is no folder {folder}: give a folder of runs")
    places = [Path(folder).expanduser() for folder in folders] or [FOLDER]
    found = [summarize(path) for place in places for path in runs_in(place)]
    if json_output:
        print_json({"runs": [each.to_dict() for each in found]})
        return
    from saqcli.cli.screens.runs import show_runs

    show_runs(found, ", ".join(folders) or f"{FOLDER}/")


def _show(given: list[str], *, json_output: bool) -> None:
    from saqcli.runs.summary import details

    if len(given) != 1:
        raise ConfigError(f"`saq runs show` shows one run, and {len(given)} were given: give one RUN")
    found = details(_taken(given[0]))
    if json_output:
        print_json(found)
        return
    from saqcli.cli.screens.runs import show_run

    show_run(found)


def _compare(given: list[str], *, json_output: bool) -> None:
    if len(given) != 2:
        raise ConfigError(f"`saq runs compare` compares two runs, and {len(given)} were given: give two RUNs")
    from saqcli.report.comparison import Record, compare, explain_diff
    from saqcli.runs.directory import RunDirectory
    from saqcli.runs.summary import details

    paths = [_taken(text) for text in given]
    records = [Record.read(RunDirectory.open(path)) for path in paths]
    compared, differences = compare(*records)
    result: dict[str, Any] = {
        "runs": [details(path) for path in paths],
        "identical": not differences,
        "compared": compared,
        "differences": [difference._asdict() for difference in differences],
        "reasons": explain_diff(*records) if differences else [],
    }
    if json_output:
        print_json(result)
        return
    from saqcli.cli.screens.runs import show_comparison

    show_comparison(result)


def _remove(given: list[str], *, yes: bool, json_output: bool) -> None:
    """Remove the files of runs, after a question on a terminal."""
    from saqcli.api.sources import find_source
    from saqcli.runs.directory import RunDirectory

    if not given:
        raise ConfigError("`saq runs rm` needs the runs to remove: give RUN")
    if "latest" in given:
        raise ConfigError("`saq runs rm` removes runs that are named only: give a run directory for latest")
    found = [
        find_source(text, ("run",), "RUN") for text in given
    ]  # a folder with one run in it is not it here
    paths = list({each.path.resolve(): each.path for each in found if each.path is not None}.values())
    for path in paths:
        RunDirectory.open(path).check_removable()
    if not yes:
        if json_output or not sys.stdin.isatty():
            raise ConfigError(
                f"removing {', '.join(map(str, paths))} cannot be undone: confirm it with --yes"
            )
        typer.confirm(f"Remove {', '.join(map(str, paths))}?", abort=True, err=True)
    removed: dict[str, list[str]] = {}
    try:
        for path in paths:
            removed[str(path)] = RunDirectory.open(path).remove()
    finally:  # what is gone is said, also if the next one cannot be removed
        if json_output and len(removed) == len(paths):
            print_json(
                {"removed": list(removed), "kept": {path: kept for path, kept in removed.items() if kept}}
            )
        for removed_path, kept in removed.items() if not json_output else ():
            left = f"; its folder stays with {', '.join(kept[:3])}, which is no file of a run" if kept else ""
            typer.echo(f"removed {removed_path}{left}")
