"""``saq report``."""

from pathlib import Path
from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli.completion import complete_run
from saqcli.cli.console import print_json, reporting
from saqcli.cli.help import FILES


@reporting
def report_command(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN...",
            help=f"Finished runs of quantize or search, or a folder of analyze; {r.LEFT_OUT}",
            autocompletion=complete_run,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="The page [default: RUN/report.html, or comparison.html for several]",
            rich_help_panel=FILES,
        ),
    ] = None,
    json_output: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Make a page of a run, or one that compares several: an HTML file that loads nothing, and Markdown.

    Both are made from the files of the run, which are not changed.

    Example: `saq report runs/resnet18-34g runs/resnet18-w4a4 --out both.html`
    """
    from saqcli.report.page.page import twin_of, write_page

    named: list[str | None] = [*runs] if runs else [None]
    taken = [
        Path(r.chosen_run(run, "a finished run", json_output=json_output, quiet=False)).expanduser()
        for run in named
    ]
    path = write_page(taken, out and out.expanduser())
    if json_output:
        print_json({"page": str(path), "markdown": str(twin_of(path)), "runs": [str(run) for run in taken]})
    else:
        typer.echo(f"wrote {path}\nthe same as Markdown: {twin_of(path)}")
