"""``saq analyze``.

What ``saq analyze`` measured, as a short table for the eye; the whole of it is in the files.
"""

from pathlib import Path
from typing import Annotated

import typer

from saqcli.cli import bit_options as b
from saqcli.cli import options as o
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.errors import Problems

INSTRUMENTS = "Instruments"
HOW = "How they measure"
FILES = "Files"


def _flag(*names: str, help: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, help=help, rich_help_panel=INSTRUMENTS)
    return option


@reporting
def analyze_command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A run directory, a .safetensors file, or a model name with --bits or --policy.",
        ),
    ],
    data: o.Data = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="A second run directory or .safetensors file, to compare with."),
    ] = None,
    sharpness: Annotated[bool, _flag("--sharpness", help="Rise of the loss within radius --rho.")] = False,
    eigenvalue: Annotated[
        bool, _flag("--eigenvalue", "--hessian", help="Largest eigenvalue of the Hessian.")
    ] = False,
    flips: Annotated[
        bool, _flag("--flips", help="Share of the weights whose code changes in Case 2.")
    ] = False,
    distributions: Annotated[
        bool, _flag("--distributions", help="Weights and inputs compared with their grids.")
    ] = False,
    trace: Annotated[bool, _flag("--trace", help="Trace of every layer's Hessian block.")] = False,
    sensitivity: Annotated[
        bool, _flag("--sensitivity", help="Loss and top-1 with one layer at a time at each of --candidates.")
    ] = False,
    landscape: Annotated[
        bool, _flag("--landscape", help="Loss over a plane through the quantized weights.")
    ] = False,
    everything: Annotated[
        bool, _flag("--all", help="All instruments; without any of these flags the first four run.")
    ] = False,
    bits: b.Bits = None,
    policy: b.Policy = None,
    images: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Images to measure on, drawn evenly over the classes.",
            rich_help_panel=o.IMAGES,
        ),
    ] = 500,
    split: Annotated[
        str, typer.Option(metavar="train|val", help="Split that they come from.", rich_help_panel=o.IMAGES)
    ] = "train",
    rho: Annotated[
        float | None,
        typer.Option(
            metavar="RADIUS",
            help="Radius of the perturbation [default: that of training at these bits]",
            rich_help_panel=HOW,
        ),
    ] = None,
    rho_unit: Annotated[
        str | None,
        typer.Option(
            metavar="deviation|absolute",
            help="Unit of --rho: standard deviations of each layer's weights, or none [default: deviation]",
            rich_help_panel=HOW,
        ),
    ] = None,
    starts: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Random starts of the power iteration [default: 3]",
            rich_help_panel=HOW,
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Most iterations of a start [default: 100]",
            rich_help_panel=HOW,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="Random vectors of the trace [default: 64]", rich_help_panel=HOW
        ),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="2,3,4",
            help="Bit-widths of the sensitivity [default: 2,3,4,5,6,8]",
            rich_help_panel=HOW,
        ),
    ] = None,
    grid: Annotated[
        int | None,
        typer.Option(
            min=3,
            metavar="N",
            help="Points along each axis of the landscape, an odd number [default: 21]",
            rich_help_panel=HOW,
        ),
    ] = None,
    span: Annotated[
        float | None,
        typer.Option(
            metavar="SPAN",
            help="Reach of the landscape to each side, in norms of the filters [default: 1]",
            rich_help_panel=HOW,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Random seed of images, directions and random vectors.",
            rich_help_panel=HOW,
        ),
    ] = 0,
    weights: o.Weights = None,
    weights_key: o.WeightsKey = None,
    pretrained: o.Pretrained = None,
    num_classes: o.NumClasses = None,
    in_chans: o.InChans = None,
    input_size: o.InputSize = None,
    mean: o.Mean = None,
    std: o.Std = None,
    model_kwargs: o.ModelKwargs = None,
    batch_size: o.EvalBatchSize = None,
    workers: o.Workers = None,
    bad_images: o.BadImages = None,
    class_order: o.ClassOrder = None,
    class_map: o.ClassMap = None,
    exif_transpose: o.ExifTranspose = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory for JSON files and pictures [default: RUN/analysis, or analysis/NAME]",
            rich_help_panel=FILES,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the analysis in --out.", rich_help_panel=FILES)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the analysis in --out.", rich_help_panel=FILES)
    ] = False,
    device: o.Device = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Analyze a quantized model: sharpness, Hessian, flips, distributions, sensitivity, loss landscape.

    Writes JSON files and pictures.

    Example: `saq analyze runs/saq --against runs/qat --landscape --data imagenet`
    """
    from saqcli.analysis import INSTRUMENTS as TABLE
    from saqcli.analysis import Settings
    from saqcli.errors import ConfigError
    from saqcli.pipelines.analysis_inputs import View
    from saqcli.pipelines.analyze import Request, analyze, check_request
    from saqcli.serialization import parse_object

    problems = Problems()
    if split not in ("train", "val"):
        problems.add(ConfigError(f"--split {split} is not known: choose train or val"))
        split = "train"
    asked = {
        "sharpness": sharpness,
        "eigenvalue": eigenvalue,
        "flips": flips,
        "distributions": distributions,
        "trace": trace,
        "sensitivity": sensitivity,
        "landscape": landscape,
    }
    chosen = tuple(name for name in TABLE if everything or asked[name]) or tuple(
        name for name, instrument in TABLE.items() if instrument.quick
    )
    settings = o.given(
        {
            "seed": seed,
            "rho": rho,
            "rho_unit": rho_unit,
            "starts": starts,
            "iterations": iterations,
            "samples": samples,
            "candidates": o.parse_widths(problems, candidates),
            "grid": grid,
            "span": span,
        }
    )
    section = o.model_section(
        problems,
        target,
        weights=weights,
        weights_key=weights_key,
        pretrained=pretrained,
        num_classes=num_classes,
        in_chans=in_chans,
        model_kwargs=model_kwargs,
        input_size=input_size,
        mean=mean,
        std=std,
    )
    pictures = o.data_section(
        problems,
        path=data,
        eval_batch_size=batch_size,
        workers=workers,
        bad_images=bad_images,
        class_order=class_order,
        class_map=class_map,
        exif_transpose=exif_transpose,
    )
    request = Request(
        target=target,
        view=View(pictures, split, images, seed),  # type: ignore[arg-type]
        instruments=chosen,
        out=out or default_out(target, bits, policy),
        settings=problems.attempt(parse_object, Settings, settings, "options") or Settings(),
        rho=rho,
        against=against,
        section=section,
        bits=bits,
        policy=policy,
        device=device or "auto",
        resume=resume,
        overwrite=overwrite,
    )
    if problems.errors:
        problems.attempt(check_request, request)
    problems.check()
    result = analyze(request, progress_for(json_output=json_output, quiet=quiet)).to_dict()
    if json_output:
        print_json(result)
        return
    from saqcli.cli.readings import show_analysis

    show_analysis(result)


def default_out(target: str, bits: str | None, policy: Path | None) -> Path:
    """Inside a run directory; beside everything else for a file or a float model."""
    path = Path(target).expanduser()
    if path.is_dir():
        return path / "analysis"
    if path.suffix == ".safetensors":
        return Path("analysis") / path.stem
    wanted = policy.stem if policy else bits or "float"
    return Path("analysis") / f"{path.name}-{o.folder_of_bits(wanted)}"
