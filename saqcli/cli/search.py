"""``saq search``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from saqcli.cli import bit_options as b
from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli.screen import print_json, progress_for, reporting

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
        typer.Option(help="Length of a search that trains: samq, asga.", rich_help_panel=SEARCH),
    ] = None,
    rho: Annotated[
        float | None, typer.Option(help="Radius of the perturbation in samq.", rich_help_panel=SEARCH)
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of the weights.", rich_help_panel=SEARCH)
    ] = None,
    search_images: Annotated[
        int | None,
        typer.Option(min=2, help="Training images to search on, drawn by seed.", rich_help_panel=SEARCH),
    ] = None,
    search_classes: Annotated[
        int | None,
        typer.Option(min=1, help="Classes to search on, drawn by seed.", rich_help_panel=SEARCH),
    ] = None,
    scoring_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Held-out images that score configurations; by default 2048.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option(
            metavar="K=V,...",
            help="The images are a proxy, with a network of their own: num_classes=10,input_size=32,weights=FILE.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    pareto: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Also search at this many budgets: a table and a picture of accuracy over cost.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = None,
    num_classes: o.NumClasses = None,
    in_chans: o.InChans = None,
    input_size: o.InputSize = None,
    mean: o.Mean = None,
    std: o.Std = None,
    model_kwargs: o.ModelKwargs = None,
    batch_size: o.BatchSize = None,
    workers: o.Workers = None,
    bad_images: o.BadImages = None,
    recipe: r.Recipe = None,
    config: r.Config = None,
    assign: r.Assign = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where everything goes; by default runs/NAME-BUDGET-SEARCHER.", rich_help_panel=o.RUN
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
    from saqcli.quant.bits import parse_candidates

    named = o.model_options(
        weights=weights,
        pretrained=pretrained,
        num_classes=num_classes,
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
        "quantization.bops": budget,
        "quantization.size": size,
        "quantization.candidates": parse_candidates(candidates) if candidates else None,
        "quantization.activation_candidates": parse_candidates(activation_candidates)
        if activation_candidates
        else None,
        "quantization.pins": o.parse_pins(pin),
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
        "search.proxy": o.parse_assignments(proxy, "--proxy"),
        "run.seed": seed,
        "run.device": device,
        "run.deterministic": deterministic,
    }
    resolved = r.resolved(recipe, config, assign or [], given, run_dir if resume else None)
    target = run_dir or r.default_run_dir(resolved, resolved.quantization.searcher)
    if dry_run:
        r.show_plan(resolved, target, json_output=json_output)
        return
    from saqcli.workflows.search import search

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
