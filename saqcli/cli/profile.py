"""``saq profile``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli.completion import complete_source
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.errors import ConfigError

if TYPE_CHECKING:
    from saqcli.pipelines.latency.measure import LatencySettings

MEASURE = "Latency on this machine"


@reporting
@o.with_settings(
    *("quantization.bits", "quantization.policy", "quantization.candidates", "quantization.target"),
    o.adapted(
        "quantization.bops",
        help="Budget of bit-operations for one image: `34G`, `5e8`, `w4a4` for the cost of 4 bits everywhere, or `50%` "
        "of that of 8 bits everywhere",
    ),
    "quantization.size",
    "quantization.quantize_attention",
    *("model.weights", "model.weights_key"),
    o.adapted(
        "model.pretrained",
        help="Load the published weights; no cost depends on them",
        default="--no-pretrained",
    ),
    *("model.num_classes", "model.in_chans", "model.input_size", "model.kwargs"),
)
def profile_command(
    given: o.Given,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            autocompletion=complete_source,
            help="A model name (see `saq models`), or a run directory, .safetensors or .onnx file, whose bits are "
            f"known; {r.LEFT_OUT}",
        ),
    ] = None,
    builder: o.Builder = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Measure the latency of every layer in ONNX Runtime on this machine",
            rich_help_panel=MEASURE,
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Table of costs that --measure writes, for --cost",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            metavar="w8a8,w4a8",
            help="Widths that --measure exports besides floating point [default: those of w8a8, w4a8 and w4a4 that "
            "the target runs]",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    style: Annotated[
        str | None,
        typer.Option(
            metavar="STYLE",
            help="Style of the files that --measure runs [default: the first that the target reads, else qdq]",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Threads per operator of --measure [default: 1]", rich_help_panel=MEASURE
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Rounds of --measure [default: 50]", rich_help_panel=MEASURE),
    ] = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Compute MACs, bit-operations and size of a network at given bits or of a run, and the reachable budgets.

    No data is needed. Under a budget, the bits are the most uniform ones within it. `--measure` gives milliseconds of
    each layer instead, a budget of `saq search`.

    Example: `saq profile resnet18 --bits 4`

    Example: `saq profile resnet18 --bops 50%`

    Example: `saq profile runs/resnet18-34g`

    Example: `saq profile resnet18 --measure --target ort-cpu --out cpu.json`
    """
    from saqcli.pipelines.profile import check_profile, profile, profile_latency

    if source is None and (named := sorted(path for path in given if path.startswith("quantization."))):
        flags = ", ".join(str(o.flag_of(path)) for path in named)
        raise ConfigError(
            f"{flags}: no model was named, and a run has its own bits: give the model as SOURCE"
        )
    source = r.chosen_run(source, "bits", models=True, json_output=json_output, quiet=quiet)
    settings = given.problems.attempt(_latency_settings, measure, out, widths, style, threads, repeats)

    section, quantization = given.model(source), given.quantization()
    if given.problems.errors:
        given.problems.attempt(check_profile, section, quantization, builder)
    given.problems.check()
    progress = progress_for(json_output=json_output, quiet=quiet)
    if settings is not None:
        latency = profile_latency(section, quantization, settings, progress=progress, builder=builder)
        if out is not None:
            latency.write(out)
        if json_output:
            print_json(latency.to_dict() | {"out": None if out is None else str(out)})
            return
        from saqcli.cli.screens.latency import show_latency

        show_latency(latency.to_dict(), out)
        return
    result = profile(
        section,
        quantization,
        progress=progress,
        pretrained=section.pretrained if "model.pretrained" in given else False,
        builder=builder,
    ).to_dict()
    if json_output:
        print_json(result)
        return
    from saqcli.cli.screens.tables import show_profile

    show_profile(result)


def _latency_settings(
    measure: bool,
    out: Path | None,
    widths: str | None,
    style: str | None,
    threads: int | None,
    repeats: int | None,
) -> "LatencySettings | None":
    """The settings of ``--measure``; None without it.

    Raises:
        ConfigError: one of its options without ``--measure``, or an invalid value.
    """
    options = {"--out": out, "--widths": widths, "--style": style, "--threads": threads, "--repeats": repeats}
    for option, value in options.items():
        if value is not None and not measure:
            raise ConfigError(f"{option} requires --measure: add it")
    if not measure:
        return None
    if out is not None and out.suffix != ".json":
        raise ConfigError(f"--out {out} does not end with .json: give a file name like cpu.json")
    from saqcli.pipelines.latency.measure import LatencySettings

    given = {"style": style, "threads": threads, "repeats": repeats}
    found = LatencySettings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    if widths is not None:
        found = replace(found, widths=tuple(part.strip() for part in widths.split(",")))
    found.check()
    return found
