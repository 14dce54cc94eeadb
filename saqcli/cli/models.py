"""``saq models``: a table on a terminal, names for a pipe, or JSON."""

import sys
from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli.completion import complete_model
from saqcli.cli.console import print_json, reporting


@reporting
def models_command(
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="PATTERN",
            autocompletion=complete_model,
            help="Shell pattern: `'resnet*'`, or `'resnet50.*'` for the published weights of one network; all "
            "without one",
        ),
    ] = None,
    json_output: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """List the networks that can be quantized; on a terminal with parameters, input size and published weights.

    A network is covered if the smallest of its family passed wrapping, calibration, a SAQ step and verified export.

    Example: `saq models 'timm/mobilenetv3*'`
    """
    from saqcli.errors import UnknownModel
    from saqcli.models.catalogue import find

    entries = find(pattern)
    if not entries:
        raise UnknownModel(
            f"no network matches {pattern!r}: try a wider pattern such as '*{(pattern or '').strip('*')}*'"
        )
    if json_output:
        print_json(
            {
                "models": [
                    {
                        "name": entry.name,
                        "parameters": entry.parameters,
                        "input_size": entry.input_size,
                        "tags": entry.tags,
                        "covered": entry.covered,
                    }
                    for entry in entries
                ]
            }
        )
    elif sys.stdout.isatty():
        from saqcli.cli.screens.tables import show_models

        show_models(entries)
    else:
        for entry in entries:
            typer.echo(entry.name)
