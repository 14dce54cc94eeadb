"""``saq analyze``."""

import functools
import inspect
import re
from collections.abc import Callable, Collection
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any

import typer

from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli.completion import complete_run, complete_source
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.cli.help import FILES, INSTRUMENTS, MEASURING
from saqcli.errors import ConfigError
from saqcli.option import DATA
from saqcli.plugins import entry_points_of, outside_names

# Our instruments and their help, as in the table of instruments, which a test compares; importing that needs torch.
OURS = {
    "sharpness": "Rise of the loss within radius --rho",
    "eigenvalue": "Largest eigenvalue of the Hessian",
    "flips": "Share of the weights whose code changes in Case 2",
    "distributions": "Weights and inputs compared with their grids",
    "trace": "Trace of every layer's Hessian block",
    "sensitivity": "Loss and top-1 with one layer at a time at each of --candidates",
    "landscape": "Loss over a plane through the quantized weights",
}
ALIASES = {"eigenvalue": ("--hessian",)}


def _flag(*names: str, help: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, help=help, rich_help_panel=INSTRUMENTS)
    return option


def _described(point: EntryPoint) -> str:
    """What the package of an instrument says of itself, which is known without importing it."""
    if point.dist is None:
        return "Instrument of another package"
    about = point.dist.metadata
    return f"Instrument of package {point.dist.name}" + (
        f": {about['Summary']}" if "Summary" in about else ""
    )


def with_instruments(command: Callable[..., None]) -> Callable[..., None]:
    """Add a flag for every instrument to a command, which receives the names of the given ones as ``requested``.

    Instruments of other packages are added by their names alone, without importing them. One with the name of another
    option has no flag.
    """
    declared = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for each in inspect.signature(command).parameters.values()
        if each.name != "requested"
    ]
    flags = {name: _flag(f"--{name}", *ALIASES.get(name, ()), help=text) for name, text in OURS.items()}
    taken = {*OURS, "all", "help", *(each.name.replace("_", "-") for each in declared)}
    taken |= {
        name for setting in o.SETTINGS.values() for name in (setting.flag[2:], f"no-{setting.flag[2:]}")
    }
    for point in entry_points_of("instruments"):
        if re.fullmatch("[a-z][a-z0-9_-]*", point.name) and point.name.replace("_", "-") not in taken:
            flags.setdefault(point.name, _flag(f"--{point.name.replace('_', '-')}", help=_described(point)))
    parameters = {
        name: inspect.Parameter(
            f"measure_{name.replace('-', '_')}",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, flag],
        )
        for name, flag in flags.items()
    }

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = [name for name, parameter in parameters.items() if values.pop(parameter.name)]
        command(requested=given, **values)

    run.__signature__ = inspect.Signature([*parameters.values(), *declared])  # type: ignore[attr-defined]
    return run


@reporting
@o.with_settings(
    *("quantization.bits", "quantization.policy"),
    *(setting for setting in (*o.IMAGES, *o.FLOAT_MODEL, "run.device") if setting != "data.split"),
    o.adapted("training.rho", default="that of training at these bits", panel=MEASURING),
    o.adapted("training.rho_unit", panel=MEASURING),
    o.adapted("quantization.candidates", help="Bit-widths of the sensitivity", panel=MEASURING),
    o.adapted("run.seed", help="Random seed of images, directions and random vectors", panel=MEASURING),
)
@with_instruments
def analyze_command(
    given: o.Given,
    requested: Collection[str],
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            autocompletion=complete_source,
            help="A run directory, a .safetensors file, or a model name with --bits or --policy; "
            f"{r.LEFT_OUT}",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Second run directory or .safetensors file, to compare with",
            autocompletion=complete_run,
        ),
    ] = None,
    everything: Annotated[
        bool,
        _flag(
            "--all",
            help="All instruments; without any of these options the first four run"
            + (", and quick ones of other packages" if outside_names("instruments") else ""),
        ),
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
        str,
        typer.Option(
            metavar="train|val|NAME",
            help="Split that they come from",
            rich_help_panel=DATA,
            autocompletion=lambda: ["train", "val"],
        ),
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
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME.KEY=VALUE",
            help="A setting of an instrument of another package. May be repeated",
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
    from saqcli.pipelines.analysis_inputs import ImageSelection
    from saqcli.pipelines.analyze import Request, analyze, check_request
    from saqcli.serialization import parse_object

    problems = given.problems
    bits, policy = given.get("quantization.bits"), given.path("quantization.policy")
    if source is None and (bits is not None or policy is not None):
        raise ConfigError(
            "--bits and --policy belong to a model, and none was named: give its name as SOURCE"
        )
    source = r.chosen_run(source, "a model", models=True, json_output=json_output, quiet=quiet)
    chosen = (
        tuple(TABLE)
        if everything
        else tuple(dict.fromkeys((*(n for n in TABLE if n in requested), *requested)))
    )
    chosen = chosen or tuple(name for name, instrument in TABLE.items() if instrument.quick)
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
    data = r.images_for(given, source, json_output=json_output, quiet=quiet)
    if split not in ("train", "val"):
        data, split = data.model_copy(update={"split": split}), "val"
    request = Request(
        source=source,
        selection=ImageSelection(data, split, images, seed),  # type: ignore[arg-type]
        instruments=chosen,
        out=out or default_out(source, bits, policy),
        settings=problems.attempt(parse_object, Settings, settings, "options") or Settings(),
        options=problems.attempt(parse_options, assign or []) or {},
        rho=rho,
        against=against,
        section=given.model(source),
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
    from saqcli.cli.screens.readings import show_analysis

    show_analysis(result)


def parse_options(texts: list[str]) -> dict[str, dict[str, Any]]:
    """``NAME.KEY=VALUE`` texts as values by name of the instrument and key.

    Raises:
        ConfigError: a text of another form.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        name, dot, key = path.strip().partition(".")
        if not equals or not dot or not name or not key:
            raise ConfigError(f"`assignments={text}`: give NAME.KEY=VALUE with the name of an instrument")
        found.setdefault(name, {})[key] = o.literal(value.strip())
    return found


def default_out(source: str, bits: str | None, policy: Path | None) -> Path:
    """The default output folder: ``analysis`` inside a run directory; ``analysis/NAME`` for a file or a float model."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path / "analysis"
    if path.suffix == ".safetensors":
        return Path("analysis") / path.stem
    wanted = policy.stem if policy else bits or "float"
    return Path("analysis") / f"{o.folder_of_model(path.name)}-{o.folder_of_bits(wanted)}"
