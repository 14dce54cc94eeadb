"""The Typer application: one command per file, imported when it is used."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.main

from saqcli._version import __version__
from saqcli.allocator import keep_freed_memory
from saqcli.cli.help import HelpCommand, HelpGroup

COMMANDS = {  # names and the first sentence of the help
    "quantize": "Quantize a pretrained network to given bits or under a budget, fine-tune it, export it, and check the "
    "result",
    "search": "Find bits for every layer of a network under a budget of bit-operations, of bytes, or of both",
    "rerun": "Repeat a run from its directory, and compare the two: bits, metrics, weights, ONNX file, figures",
    "eval": "Measure the accuracy of a float model, a quantized run or an exported file on a folder of images",
    "export": "Export a quantized model to ONNX. The file is written only if it passes the comparison with the "
    "model",
    "profile": "Compute MACs, bit-operations and size of a network at given bits or of a run, and the reachable "
    "budgets",
    "analyze": "Analyze a quantized model: sharpness, Hessian, flips, distributions, sensitivity, loss landscape",
    "report": "Make a page of a run, or one that compares several: an HTML file that loads nothing, and Markdown",
    "runs": "List the runs in a folder, show or compare them, or remove them: network, bits, top-1, BOPs, state, age",
    "models": "List the networks that can be quantized; on a terminal with parameters, input size and published "
    "weights",
    "targets": "List the targets: runtimes and devices, and what they run in integers",
    "demo": "Run the whole pipeline offline on 1,797 handwritten digits: train in float, search bits, quantize, "
    "export, check",
}


class _Commands(Mapping[str, Any]):
    """The commands by name, imported when used."""

    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        return _command(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@cache
def _command(name: str) -> Any:
    """The command ``name``, with flags in place of the settings that the help of its options names."""
    from saqcli.cli.flags import as_flags, command_of

    module = import_module(f"saqcli.cli.{'evaluate' if name == 'eval' else name}")
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name, cls=HelpCommand)(getattr(module, f"{name}_command"))
    command: Any = typer.main.get_command(alone)
    for parameter in command.params:
        if "__" in parameter.name:  # of a setting
            parameter.help = as_flags(parameter.help, command_of(name, command.params))
    return command


class _LazyGroup(HelpGroup):
    summaries = COMMANDS

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()  # type: ignore[assignment]


app = typer.Typer(
    name="saq",
    cls=_LazyGroup,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sharpness-aware quantization of pretrained vision models under a hard budget of bit-operations.",
)


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
    from saqcli.cli.flags import enter

    enter(context)


def main() -> None:
    """Run the command line, with the allocator set, and telemetry and unneeded files of libraries disabled.

    All of it comes before libraries are imported. ONNX Runtime sends usage data, and keeps a device id and a database
    in the home folder. PyTorch creates a cache folder for compiled code on import, unless it is given an existing one;
    what is compiled is kept in its default folder (``quant.kernels.compiled``).
    """
    keep_freed_memory()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    app()
