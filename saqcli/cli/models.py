"""``saq models``."""

from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli.screen import print_json, reporting


@reporting
def models_command(
    pattern: Annotated[
        str | None, typer.Argument(metavar="[PATTERN]", help="Shell pattern, such as 'resnet*'.")
    ] = None,
    json_output: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Names of the networks that can be quantized.

    Example: `saq models 'timm/mobilenetv3*'`
    """
    from saqcli.errors import UnknownModel
    from saqcli.io.models import list_models

    names = list_models(pattern)
    if not names:
        raise UnknownModel(
            f"no network matches {pattern!r}: try a wider pattern such as '*{(pattern or '').strip('*')}*'"
        )
    if json_output:
        print_json({"models": names})
        return
    for name in names:
        typer.echo(name)
