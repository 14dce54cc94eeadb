"""``saq search``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.config import RunConfig
from saqcli.option import RUN


@reporting
@o.with_settings(
    *("quantization", "data", "model", "search", "recipe", "run"),
    without=[
        *(
            "quantization.bits",
            "quantization.policy",
            "quantization.balance_norms",
            "quantization.compensate",
        ),
        *("data.eval_batch_size", "data.verify_images"),
    ],
)
def search_command(
    given: o.Given,
    model: o.Model = None,
    config: r.Config = None,
    assign: r.Assign = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Run directory to write [default: runs/NAME-BUDGET-SEARCHER]",
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: r.Resume = False,
    overwrite: r.Overwrite = False,
    dry_run: r.DryRun = False,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Find bits for every layer of a network under a budget of bit-operations, of bytes, or of both.

    Example: `saq search resnet18 --budget 34G --searcher samq --data imagenet`
    """
    given.update({} if model is None else {"model.name": model})
    resumed = ("search", run_dir) if resume and run_dir else None
    check = partial(_check, dry_run=dry_run)
    resolved = r.resolved(given, config, assign, resumed, check)
    target = run_dir or r.default_run_dir(resolved, resolved.quantization.searcher)
    if dry_run:
        r.dry_run(
            resolved,
            target,
            "search",
            resume=resume,
            overwrite=overwrite,
            json_output=json_output,
            quiet=quiet,
        )
        return
    from saqcli.pipelines.search import search

    result = search(
        resolved,
        target,
        resume=resume,
        overwrite=overwrite,
        progress=progress_for(json_output=json_output, quiet=quiet),
    )
    if json_output:
        print_json(result)
    else:
        from saqcli.cli.screens.tables import show_searched

        show_searched(result)
    r.check_accuracy(result)


def _check(config: RunConfig, *, dry_run: bool) -> None:
    from saqcli.pipelines.checks import check_search

    check_search(config, images=not dry_run)
