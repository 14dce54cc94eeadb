"""``saq demo``."""

from pathlib import Path
from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli.screen import print_json, progress_for, reporting


@reporting
def demo_command(
    run_dir: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write to.")] = Path("runs/demo"),
    bops: Annotated[
        str, typer.Option("--bops", "--budget", metavar="BUDGET", help="Budget of bit-operations.")
    ] = "w3a3",
    epochs: Annotated[int, typer.Option(min=0, metavar="N", help="Epochs of fine-tuning.")] = 6,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Random seed.")] = 0,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """The whole job offline on 1,797 handwritten digits: train a float network, quantize it, export and check it."""
    from saqcli.workflows.demo import demo

    progress = progress_for(json_output=json_output, quiet=quiet)
    result = demo(run_dir, bops=bops, epochs=epochs, seed=seed, progress=progress)
    if json_output:
        print_json(result)
        return
    from saqcli.cli.tables import show_quantized

    show_quantized(result, fine_tuned=epochs > 0)
