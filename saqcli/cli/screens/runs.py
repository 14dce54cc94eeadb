"""Tables of saq runs."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.console import Console

from saqcli.cli.flags import as_flags
from saqcli.cli.screens.tables import PIPED, print_table, print_text
from saqcli.units import counted, format_duration, format_figure, format_quantity

if TYPE_CHECKING:
    from saqcli.runs.summary import RunSummary

FIGURES = {  # of a run, in the order of the table; the unit of each
    "top1": ("top-1", " %"),
    "top5": ("top-5", " %"),
    "float_top1": ("float top-1", " %"),
    "agreement": ("agrees with float", " %"),
    "bops": ("BOPs", "BOPs"),
    "budget_bops": ("budget", "BOPs"),
    "bops_reduction": ("fewer BOPs", "x"),
    "size_bytes": ("size", "B"),
}


def show_runs(runs: "Sequence[RunSummary]", where: str) -> None:
    """Print a line for each run."""
    console = Console()
    if not runs:
        print_text(console, f"no runs in {where}", markup=False)
        return
    rows = [
        [
            str(run.path),
            run.model or "-",
            run.bits or "-",
            format_figure(run.top1, ".2f", " %"),
            "-" if run.bops is None else format_quantity(run.bops),
            run.state if run.verb != "search" else f"{run.state} search",
            age_text(run.age),
        ]
        for run in runs
    ]
    columns = ("run", "network", "bits", "top-1", "BOPs", "state", "age")
    print_table(console, columns, rows, left=(0, 1, 2, 5))


def age_text(seconds: float) -> str:
    """Time since an event, in its largest unit.

    Example:
        >>> age_text(7), age_text(600), age_text(8000), age_text(90_000)
        ('7 s', '10 min', '2 h', '1 d')
    """
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def show_run(run: dict[str, Any]) -> None:
    """Print what is known of one run."""
    console = Console() if sys.stdout.isatty() else Console(width=PIPED)
    spent = ", ".join(f"{stage} {format_duration(seconds)}" for stage, seconds in run["seconds"].items())
    rows = [
        ("network", run["model"] or "-"),
        ("bits", run["bits"] or "-"),
        *_figures(run),
        ("state", as_flags(run["status"])),
        *([("next", as_flags(run["next"]))] if run["next"] else []),
        ("started", run["started"]),
        *([("time", spent)] if spent else []),
        ("command", command_text(run["command"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
        *(("wrote", path) for path in run["artifacts"]),
    ]
    print_table(console, ("", ""), rows, title=f"{run['run_dir']}, a run of `saq {run['verb']}`", left=(0, 1))


def command_text(command: Sequence[str]) -> str:
    """A command line to copy; the first word is the program.

    Example:
        >>> command_text(["/usr/lib/saqcli/__main__.py", "quantize", "my net"])
        "saq quantize 'my net'"
    """
    words = ["saq" if PurePath(word).parent.name == "saqcli" else word for word in command[:1]]
    return shlex.join([*words, *command[1:]])


def _figures(run: dict[str, Any]) -> list[tuple[str, str]]:
    return [(FIGURES[key][0], _figure(key, run["figures"][key])) for key in FIGURES if key in run["figures"]]


def _figure(key: str, value: Any) -> str:
    unit = FIGURES[key][1]
    if unit in ("BOPs", "B"):
        return format_quantity(value, unit)
    return format_figure(value, ".2f" if unit == " %" else ".1f", unit)


def show_comparison(result: dict[str, Any]) -> None:
    """Print the figures of two runs side by side, then what differs and the likely causes."""
    console = Console() if sys.stdout.isatty() else Console(width=PIPED)
    runs = result["runs"]
    rows = [
        [what, *(run[key] or "-" for run in runs)] for key, what in (("model", "network"), ("bits", "bits"))
    ]
    for key, (title, _) in FIGURES.items():
        values = [run["figures"].get(key) for run in runs]
        if values != [None, None]:
            rows.append([title, *("-" if value is None else _figure(key, value) for value in values)])
    print_table(console, ("", *(run["run_dir"] for run in runs)), rows, left=(0,))
    print_text(console, "")
    details = {each["what"]: each["detail"] for each in result["differences"]}
    for what in result["compared"]:
        detail = as_flags(details[what]) if what in details else "bit-identical"
        print_text(console, f"{what}: {detail}", markup=False)
    if details:
        same = len(result["compared"]) - len(details)
        print_text(console, f"{counted(len(details), 'part')} differ, {same} are identical", markup=False)
    for reason in result["reasons"]:
        print_text(console, f"likely cause: {as_flags(reason)}", markup=False)
