"""``saq quantize``."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.config import ExportSection, RunConfig
from saqcli.errors import ConfigError
from saqcli.option import EFFICIENCY, RUN

# The settings of --efficient; measurements are in docs/reproduction.md.
EFFICIENT: dict[str, Any] = {"training.ascent_fraction": 0.25}


@reporting
@o.with_settings(
    *("quantization", "data", "model", "reconstruction", "training", "export", "recipe", "run"),
    without=["data.eval_batch_size"],
)
def quantize_command(
    given: o.Given,
    model: o.Model = None,
    efficient: Annotated[
        bool,
        typer.Option(
            "--efficient",
            help="Cheaper steps of sharpness-aware methods: `--ascent-fraction 0.25`",
            rich_help_panel=EFFICIENCY,
        ),
    ] = False,
    export: r.Export = None,
    config: r.Config = None,
    assign: r.Assign = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Run directory to write [default: runs/NAME-BITS]", rich_help_panel=RUN
        ),
    ] = None,
    resume: r.Resume = False,
    overwrite: r.Overwrite = False,
    dry_run: r.DryRun = False,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Quantize a pretrained network to given bits or under a budget, fine-tune it, export it, and check the
    result.

    Example: `saq quantize resnet18 --bits 4 --recipe minutes --calibration photos`

    Example: `saq quantize resnet18 --bops 34G --data imagenet`
    """
    given.update({} if model is None else {"model.name": model})
    _choose_styles(given, export)
    assigned = [text.partition("=")[0].strip() for text in assign or []]
    for path, value in EFFICIENT.items() if efficient else ():
        if path not in assigned:
            given.setdefault(path, value)
    resumed = ("quantize", run_dir) if resume and run_dir else None
    check = partial(_check, dry_run=dry_run)
    resolved = r.resolved(given, config, assign, resumed, check)
    if "reconstruction.iterations" in given and not resolved.reconstruction.enabled:
        iterations = given["reconstruction.iterations"]
        raise ConfigError(f"--iterations {iterations} has no effect without --reconstruct: add it")
    target = run_dir or r.default_run_dir(resolved)
    progress = progress_for(json_output=json_output, quiet=quiet)
    if dry_run:
        r.dry_run(
            resolved,
            target,
            "quantize",
            resume=resume,
            overwrite=overwrite,
            json_output=json_output,
            quiet=quiet,
        )
        return
    from saqcli.pipelines.quantize import quantize

    result = quantize(resolved, target, resume=resume, overwrite=overwrite, progress=progress).to_dict(target)
    if json_output:
        print_json(result)
    else:
        from saqcli.cli.screens.tables import show_quantized

        show_quantized(result)
    r.check_accuracy(result)


def _choose_styles(given: o.Given, export: bool | None) -> None:
    """Set ``export.styles`` from ``--export`` and ``--style``.

    Raises:
        ConfigError: ``--style`` with ``--no-export``.
    """
    styles = given.get("export.styles")
    if styles and export is False:
        raise ConfigError(f"--style {styles[0]} selects an ONNX style: remove it, or --no-export")
    if export is not None:
        given.setdefault("export.styles", ExportSection().styles if export else ())


def _check(config: RunConfig, *, dry_run: bool) -> None:
    from saqcli.pipelines.checks import check_quantize

    check_quantize(config, images=not dry_run)
