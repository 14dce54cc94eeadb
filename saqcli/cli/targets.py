"""``saq targets``: what every target can run, or one of them in full."""

from typing import Annotated, Any

import typer

from saqcli.cli import options as o
from saqcli.cli.console import print_json, reporting


@reporting
def targets_command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            autocompletion=lambda: list(o.SETTINGS["quantization.target"].choices),
            help="A target, or a file NAME.toml with one; all without",
        ),
    ] = None,
    json_output: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """List the targets: runtimes and devices, and what they run in integers.

    A target decides which operators are quantized besides layers, which bits are allowed, and how files are written.

    Example: `saq targets ort-cpu`
    """
    from saqcli.target import TARGETS, find_deployment

    chosen = list(TARGETS.values()) if name is None else [find_deployment(name, "TARGET")]
    if json_output:
        found: dict[str, Any] = {"targets": [each.model_dump(mode="json") for each in chosen]}
        print_json(found if name is None else found["targets"][0])
        return
    from saqcli.cli.screens.tables import show_target, show_targets

    if name is None:
        show_targets(chosen)
    else:
        show_target(chosen[0])
