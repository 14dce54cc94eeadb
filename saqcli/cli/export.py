"""``saq export``."""

from pathlib import Path
from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli.completion import complete_run
from saqcli.cli.console import print_json, progress_for, reporting

STYLES = o.SETTINGS["export.styles"].choices


@reporting
@o.with_settings(
    *o.IMAGES,
    "data.verify_images",
    o.adapted(
        "quantization.target",
        help="Where the file will run: {choices}, or a file NAME.toml; refused if it cannot run the model",
        default="that of the run",
    ),
)
def export_command(
    given: o.Given,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            autocompletion=complete_run,
            help=f"A run directory, or a model.safetensors; {r.LEFT_OUT}",
        ),
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(
            "--onnx",
            metavar="FILE",
            help="File to write [default: model-STYLE.onnx in the run's artifacts, or NAME-STYLE.onnx beside the file]",
        ),
    ] = None,
    style: Annotated[
        str | None,
        typer.Option(
            metavar="STYLE",
            help=f"How quantizers are written: {o.listed(STYLES)} [default: the first that the target reads, else qdq]",
            autocompletion=lambda: list(STYLES),
        ),
    ] = None,
    verify: Annotated[
        list[str] | None,
        typer.Option(
            "--verify", metavar="RUNTIME", help="Also verify with another runtime: openvino. May be repeated"
        ),
    ] = None,
    builder: o.Builder = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists")] = False,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Export a quantized model to ONNX. The file is written only if it passes the comparison with the model.

    Example: `saq export`

    Example: `saq export runs/resnet18-w4a4 --onnx resnet18.onnx --data imagenet`
    """
    from saqcli.pipelines.export import check_export, export

    source = Path(r.chosen_run(run, "a model", json_output=json_output, quiet=quiet))
    images = r.images_for(given, str(source), json_output=json_output, quiet=quiet, optional=True)
    target = given.get("quantization.target")
    if given.problems.errors:
        given.problems.attempt(check_export, source, onnx, style, images, tuple(verify or ()), target)
    given.problems.check()
    result = export(
        source,
        onnx,
        style=style,
        data=images,
        overwrite=overwrite,
        progress=progress_for(json_output=json_output, quiet=quiet),
        runtimes=tuple(verify or ()),
        builder=builder,
        target=target,
    ).to_dict()
    if json_output:
        print_json(result)
        return
    from saqcli.cli.screens.tables import show_export

    show_export(result)
