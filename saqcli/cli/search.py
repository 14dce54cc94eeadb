"""``saq search``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saqcli.cli import bit_options as b
from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.errors import Problems

if TYPE_CHECKING:
    from saqcli.config import RunConfig

SEARCH = "Search"


@reporting
def search_command(
    model: o.OptionalModel = None,
    data: o.Data = None,
    budget: b.Bops = None,
    size: b.Size = None,
    searcher: b.SearcherName = None,
    candidates: b.Candidates = None,
    activation_candidates: b.ActivationCandidates = None,
    pin: b.Pin = None,
    quantizer: b.QuantizerName = None,
    weight_grid: b.WeightGrid = None,
    granularity: b.Granularity = None,
    weight_norm: b.WeightNorm = None,
    correct_bias: b.CorrectBias = None,
    recalibrate_bn: b.RecalibrateBN = None,
    quantize_attention: b.QuantizeAttention = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Length of a search that trains (samq, asga) [default: the searcher's own]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    rho: Annotated[
        float | None,
        typer.Option(
            metavar="RADIUS",
            help="Radius of the perturbation in samq [default: the searcher's own]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="Learning rate of the weights during the search [default: 0.01]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    search_images: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Training images to search on, drawn by seed [default: all]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    search_classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Classes to search on, drawn by seed [default: all]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    scoring_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Held-out images that score configurations, at most [default: 2048]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option(
            metavar="K=V,...",
            help="Search on a smaller data set, with a network built for it: "
            "`num_classes=10,input_size=32,weights=FILE`.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    pareto: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Also search at N budgets: a table and a picture of accuracy over cost [default: 0]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    weights: o.Weights = None,
    weights_key: o.WeightsKey = None,
    pretrained: o.Pretrained = None,
    num_classes: o.NumClasses = None,
    new_head: o.NewHead = None,
    in_chans: o.InChans = None,
    input_size: o.InputSize = None,
    mean: o.Mean = None,
    std: o.Std = None,
    model_kwargs: o.ModelKwargs = None,
    batch_size: o.BatchSize = None,
    workers: o.Workers = None,
    bad_images: o.BadImages = None,
    class_order: o.ClassOrder = None,
    class_map: o.ClassMap = None,
    exif_transpose: o.ExifTranspose = None,
    recipe: r.Recipe = None,
    config: r.Config = None,
    assign: r.Assign = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Run directory to write [default: runs/NAME-BUDGET-SEARCHER]",
            rich_help_panel=o.RUN,
        ),
    ] = None,
    resume: r.Resume = False,
    overwrite: r.Overwrite = False,
    seed: r.Seed = None,
    device: o.Device = None,
    deterministic: r.Deterministic = None,
    dry_run: r.DryRun = False,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Find bits for every layer of a network under a budget of bit-operations, of bytes, or of both.

    Example: `saq search resnet18 --budget 34G --searcher samq --data imagenet`
    """
    problems = Problems()
    named = o.model_options(
        problems,
        weights=weights,
        weights_key=weights_key,
        pretrained=pretrained,
        num_classes=num_classes,
        new_head=new_head,
        in_chans=in_chans,
        model_kwargs=model_kwargs,
        input_size=input_size,
        mean=mean,
        std=std,
    )
    given: dict[str, Any] = {f"model.{name}": value for name, value in named.items()} | {
        "model.name": model,
        "data.path": data,
        "data.batch_size": batch_size,
        "data.workers": workers,
        "data.bad_images": bad_images,
        "data.class_order": class_order,
        "data.class_map": class_map,
        "data.exif_transpose": exif_transpose,
        "quantization.bops": budget,
        "quantization.size": size,
        "quantization.candidates": o.parse_widths(problems, candidates),
        "quantization.activation_candidates": o.parse_widths(
            problems, activation_candidates, "--activation-candidates"
        ),
        "quantization.pins": problems.attempt(o.parse_pins, pin),
        "quantization.quantizer": quantizer,
        "quantization.weight_grid": weight_grid,
        "quantization.granularity": granularity,
        "quantization.weight_normalization": weight_norm,
        "quantization.correct_bias": correct_bias,
        "quantization.recalibrate_bn": recalibrate_bn,
        "quantization.quantize_attention": quantize_attention,
        "quantization.searcher": searcher,
        "search.epochs": epochs,
        "search.rho": rho,
        "search.images": search_images,
        "search.classes": search_classes,
        "search.scoring_images": scoring_images,
        "search.lr": lr,
        "search.pareto": pareto,
        "search.proxy": problems.attempt(o.parse_assignments, proxy, "--proxy"),
        "run.seed": seed,
        "run.device": device,
        "run.deterministic": deterministic,
    }
    resumed = ("search", run_dir) if resume and run_dir else None
    check = partial(_check, dry_run=dry_run)
    resolved = r.resolved(problems, recipe, config, assign or [], given, resumed, check)
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
        return
    from saqcli.cli.tables import show_searched

    show_searched(result)


def _check(config: "RunConfig", *, dry_run: bool) -> None:
    from saqcli.pipelines.checks import check_search

    check_search(config, images=not dry_run)
