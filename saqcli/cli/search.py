"""``saq search``."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli.completion import complete_run
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.config import RunConfig
from saqcli.errors import ConfigError
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
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            autocompletion=complete_run,
            help="Solve the search of this run again for another budget, from the scores that it kept, without data",
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

    Example: `saq search --from runs/resnet18-34G-error --budget 20G`
    """
    if source is not None:
        alone = {"MODEL": model, "--config": config, "--resume": resume, "--dry-run": dry_run}
        for name in (name for name, value in alone.items() if value):
            given.problems.add(
                ConfigError(f"--from {source} has its own network and settings: remove {name}")
            )
        resolved = _settings_of(source, given, assign)
        from saqcli.pipelines.searching.again import search_again

        result = search_again(
            source,
            resolved,
            run_dir or r.default_run_dir(resolved, resolved.quantization.searcher),
            overwrite=overwrite,
            progress=progress_for(json_output=json_output, quiet=quiet),
        )
        _show(result, json_output=json_output)
        return
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
    _show(result, json_output=json_output)
    r.check_accuracy(result)


def _check(config: RunConfig, *, dry_run: bool) -> None:
    from saqcli.pipelines.checks import check_search

    check_search(config, images=not dry_run)


BUDGETS = ("bops", "size", "max_drop", "min_top1")


def _settings_of(source: Path, given: o.Given, assign: list[str] | None) -> RunConfig:
    """The settings of the run ``source`` with what is given, which alone has a budget."""
    from saqcli.pipelines.searching.again import check_again, check_same_scores
    from saqcli.runs.directory import RunDirectory

    asked = {key: given.get(f"quantization.{key}") for key in BUDGETS}
    pareto = given.get("search.pareto", 0)
    run = given.problems.attempt(RunDirectory.open, source)
    given.problems.check()
    assert run is not None
    found = r.resolved(given, run.path / "config.json", assign, None, lambda config: None)
    section = found.quantization.model_copy(update=asked | {"bits": None, "policy": None})
    search = found.search.model_copy(update={"pareto": pareto})
    found = found.model_copy(update={"quantization": section, "search": search})
    check_again(found)
    check_same_scores(found, source, run.config())
    return found


def _show(result: dict[str, Any], *, json_output: bool) -> None:
    if json_output:
        print_json(result)
        return
    from saqcli.cli.screens.tables import show_searched

    show_searched(result)
