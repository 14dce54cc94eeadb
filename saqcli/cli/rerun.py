"""``saq rerun``."""

from pathlib import Path
from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli.completion import complete_run
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.errors import NotReproduced
from saqcli.option import RUN


@reporting
@o.with_settings(
    o.adapted("data.path", help="Where the same images are now, if they were moved"),
    o.adapted(
        "data.calibration",
        help="Where the same images for calibration are now, if they were moved",
        default="that of the run",
    ),
    "data.workers",
    o.adapted("model.weights", help="Where the same float weights are now, if they were moved"),
    o.adapted("run.device", default="that of the run"),
)
def rerun_command(
    given: o.Given,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            autocompletion=complete_run,
            help=f"A finished run of quantize or search; {r.LEFT_OUT}",
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Directory of the new run [default: RUN-rerun]", rich_help_panel=RUN
        ),
    ] = None,
    resume: r.Resume = False,
    overwrite: r.Overwrite = False,
    builder: o.Builder = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Repeat a run from its directory, and compare the two: bits, metrics, weights, ONNX file, figures.

    The exit code is 3 if anything differs. RUN itself is not changed.

    Example: `saq rerun runs/resnet18-34g`
    """
    from saqcli.pipelines.rerun import Overrides, rerun

    source = Path(r.chosen_run(run, "a finished run", json_output=json_output, quiet=quiet))
    device, workers = given.get("run.device"), given.get("data.workers")
    found = rerun(
        source,
        run_dir,
        Overrides(
            given.get("data.path"),
            given.get("data.calibration"),
            given.path("model.weights"),
            device,
            workers,
        ),
        resume=resume,
        overwrite=overwrite,
        builder=builder,
        progress=progress_for(json_output=json_output, quiet=quiet),
    )
    if json_output:
        print_json(found.to_dict())
    else:
        from saqcli.cli.screens.tables import show_rerun

        show_rerun(found.to_dict())
    if not found.identical:
        what = ", ".join(difference.what for difference in found.differences)
        raise NotReproduced(
            f"{found.run_dir} differs from {source}: {what} ({found.differences[0].detail}); likely cause: "
            f"{found.reasons[0]}"
        )
