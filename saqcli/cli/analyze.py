"""``saq analyze``."""

from pathlib import Path
from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.cli.help import FILES, INSTRUMENTS, MEASURING
from saqcli.option import DATA


def _flag(*names: str, help: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, help=help, rich_help_panel=INSTRUMENTS)
    return option


@reporting
@o.with_settings(
    *("quantization.bits", "quantization.policy", *o.IMAGES, *o.FLOAT_MODEL, "run.device"),
    o.adapted("training.rho", default="that of training at these bits", panel=MEASURING),
    o.adapted("training.rho_unit", panel=MEASURING),
    o.adapted("quantization.candidates", help="Bit-widths of the sensitivity", panel=MEASURING),
    o.adapted("run.seed", help="Random seed of images, directions and random vectors", panel=MEASURING),
)
def analyze_command(
    given: o.Given,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A run directory, a .safetensors file, or a model name with --bits or --policy",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="Second run directory or .safetensors file, to compare with"),
    ] = None,
    sharpness: Annotated[bool, _flag("--sharpness", help="Rise of the loss within radius --rho")] = False,
    eigenvalue: Annotated[
        bool, _flag("--eigenvalue", "--hessian", help="Largest eigenvalue of the Hessian")
    ] = False,
    flips: Annotated[
        bool, _flag("--flips", help="Share of the weights whose code changes in Case 2")
    ] = False,
    distributions: Annotated[
        bool, _flag("--distributions", help="Weights and inputs compared with their grids")
    ] = False,
    trace: Annotated[bool, _flag("--trace", help="Trace of every layer's Hessian block")] = False,
    sensitivity: Annotated[
        bool, _flag("--sensitivity", help="Loss and top-1 with one layer at a time at each of --candidates")
    ] = False,
    landscape: Annotated[
        bool, _flag("--landscape", help="Loss over a plane through the quantized weights")
    ] = False,
    everything: Annotated[
        bool, _flag("--all", help="All instruments; without any of these options the first four run")
    ] = False,
    images: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Images to measure on, drawn evenly over the classes",
            rich_help_panel=DATA,
        ),
    ] = 500,
    split: Annotated[
        str, typer.Option(metavar="train|val", help="Split that they come from", rich_help_panel=DATA)
    ] = "train",
    starts: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Random starts of the power iteration [default: 3]",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Most iterations of a start [default: 100]",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="Random vectors of the trace [default: 64]", rich_help_panel=MEASURING
        ),
    ] = None,
    grid: Annotated[
        int | None,
        typer.Option(
            min=3,
            metavar="N",
            help="Points along each axis of the landscape, an odd number [default: 21]",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    span: Annotated[
        float | None,
        typer.Option(
            metavar="SPAN",
            help="Reach of the landscape to each side, in norms of the filters [default: 1]",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory for JSON files and pictures [default: RUN/analysis, or analysis/NAME]",
            rich_help_panel=FILES,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the analysis in --out", rich_help_panel=FILES)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the analysis in --out", rich_help_panel=FILES)
    ] = False,
    builder: o.Builder = None,
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
    from saqcli.pipelines.analysis_inputs import ImageSelection
    from saqcli.pipelines.analyze import Request, analyze, check_request
    from saqcli.serialization import parse_object

    problems = given.problems
    bits, policy = given.get("quantization.bits"), given.path("quantization.policy")
    if split not in ("train", "val"):
        problems.add(ConfigError(f"--split {split} is not known: choose train or val"))
        split = "train"
    requested = {
        "sharpness": sharpness,
        "eigenvalue": eigenvalue,
        "flips": flips,
        "distributions": distributions,
        "trace": trace,
        "sensitivity": sensitivity,
        "landscape": landscape,
    }
    chosen = tuple(name for name in TABLE if everything or requested[name]) or tuple(
        name for name, instrument in TABLE.items() if instrument.quick
    )
    rho, seed = given.get("training.rho"), given.get("run.seed", 0)
    wanted = {
        "seed": seed,
        "rho": rho,
        "rho_unit": given.get("training.rho_unit"),
        "starts": starts,
        "iterations": iterations,
        "samples": samples,
        "candidates": given.get("quantization.candidates"),
        "grid": grid,
        "span": span,
    }
    settings = {name: value for name, value in wanted.items() if value is not None}
    request = Request(
        target=target,
        selection=ImageSelection(given.data(), split, images, seed),  # type: ignore[arg-type]
        instruments=chosen,
        out=out or default_out(target, bits, policy),
        settings=problems.attempt(parse_object, Settings, settings, "options") or Settings(),
        rho=rho,
        against=against,
        section=given.model(target),
        bits=bits,
        policy=policy,
        device=given.get("run.device", "auto"),
        resume=resume,
        overwrite=overwrite,
        builder=builder,
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
    """The default output folder: ``analysis`` inside a run directory; ``analysis/NAME`` for a file or a float model."""
    path = Path(target).expanduser()
    if path.is_dir():
        return path / "analysis"
    if path.suffix == ".safetensors":
        return Path("analysis") / path.stem
    wanted = policy.stem if policy else bits or "float"
    return Path("analysis") / f"{o.folder_of_model(path.name)}-{o.folder_of_bits(wanted)}"
