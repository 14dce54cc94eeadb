"""``saq demo``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.option import GENERAL

BUDGET = "80M"  # below the cost of uniform 3 bits: layers get 2, 3 or 4
EPOCHS = 6


@reporting
@o.with_settings(
    o.adapted(
        "quantization.bops",
        default=BUDGET,
        panel=GENERAL,
        help="Budget of bit-operations for one image: `80M`, `w4a4` for the cost of 4 bits everywhere, or `50%` of "
        "that of 8 bits",
    ),
    o.adapted("training.epochs", default=f"{EPOCHS}", panel=GENERAL),
    o.adapted("run.seed", panel=GENERAL),
    o.adapted("run.track", panel=GENERAL),
)
def demo_command(
    given: o.Given,
    run_dir: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write to")] = Path("runs/demo"),
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Run the whole pipeline offline on 1,797 handwritten digits: train in float, search bits, quantize, export, check.

    It takes about two minutes on two cores.
    """
    from saqcli.pipelines.demo import demo

    progress = progress_for(json_output=json_output, quiet=quiet)
    result = demo(
        run_dir,
        bops=given.get("quantization.bops", BUDGET),
        epochs=given.get("training.epochs", EPOCHS),
        seed=given.get("run.seed", 0),
        track=given.get("run.track", ()),
        progress=progress,
    )
    if json_output:
        print_json(result)
        return
    from saqcli.cli.screens.tables import show_policy, show_quantized

    layers = json.loads((run_dir / "quantized" / "search.json").read_text(encoding="utf-8"))["layers"]
    show_policy(result["policy"], layers)
    show_quantized(result)
