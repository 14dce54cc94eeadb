"""The Typer application: one command per file."""

import os
import tempfile
from typing import Annotated

import typer

from saqcli._version import __version__
from saqcli.cli.analyze import analyze_command
from saqcli.cli.demo import demo_command
from saqcli.cli.evaluate import eval_command
from saqcli.cli.export import export_command
from saqcli.cli.flags import enter
from saqcli.cli.help import HelpCommand, HelpGroup
from saqcli.cli.models import models_command
from saqcli.cli.profile import profile_command
from saqcli.cli.quantize import quantize_command
from saqcli.cli.rerun import rerun_command
from saqcli.cli.search import search_command

app = typer.Typer(
    name="saq",
    cls=HelpGroup,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sharpness-aware quantization of pretrained vision models under a hard budget of bit-operations.",
)

app.command("quantize", cls=HelpCommand)(quantize_command)
app.command("search", cls=HelpCommand)(search_command)
app.command("rerun", cls=HelpCommand)(rerun_command)
app.command("eval", cls=HelpCommand)(eval_command)
app.command("export", cls=HelpCommand)(export_command)
app.command("profile", cls=HelpCommand)(profile_command)
app.command("analyze", cls=HelpCommand)(analyze_command)
app.command("models", cls=HelpCommand)(models_command)
app.command("demo", cls=HelpCommand)(demo_command)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"saq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version")
    ] = False,
) -> None:
    enter(context)


def main() -> None:
    """Run the command line, with telemetry and unneeded files of libraries disabled before they are imported.

    ONNX Runtime sends usage data, and keeps a device id and a database in the home folder. PyTorch creates a cache
    folder for compiled code, which saq does not use, unless it is given an existing one.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    app()
