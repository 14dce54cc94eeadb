"""Options of commands that leave a run directory, and the settings that they make together."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saqcli.cli.options import RUN, folder_of_bits
from saqcli.cli.screen import print_json
from saqcli.errors import ConfigError, RunDirectoryError

if TYPE_CHECKING:
    from saqcli.config import RunConfig

Recipe = Annotated[str | None, typer.Option(help="Settings to start from.", rich_help_panel=RUN)]
Config = Annotated[
    Path | None,
    typer.Option(help="TOML or JSON, such as the config.json of a run.", rich_help_panel=RUN),
]
Assign = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Any setting; may be repeated.", rich_help_panel=RUN
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --run-dir.", rich_help_panel=RUN)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run in --run-dir.", rich_help_panel=RUN)
]
Export = Annotated[
    bool | None,
    typer.Option(
        "--export/--no-export",
        help="End with an ONNX file, which is tried before training; without, with model.safetensors alone "
        "[default: --export].",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
Style = Annotated[
    list[str] | None,
    typer.Option(
        metavar="STYLE",
        help="Style of the ONNX file: qdq, exact, trt or qonnx; may be repeated, for a file each [default: qdq].",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the settings and costs, then stop.", rich_help_panel=RUN)
]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic",
        help="The same bits again on a GPU too; slower, and refused where a kernel is missing.",
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of everything random.", rich_help_panel=RUN)]


def export_styles(*, export: bool | None, styles: list[str] | None) -> tuple[str, ...] | None:
    """The setting ``export.styles``; None where neither option was given.

    Raises:
        ConfigError: a style of a file that is not to be written.
    """
    if styles and export is False:
        raise ConfigError(f"--style {styles[0]} is of an ONNX file: remove it, or --no-export")
    if styles:
        return tuple(styles)
    return None if export is None else ("qdq",) if export else ()


def resolved(
    recipe: str | None, config: Path | None, assign: list[str], given: dict[str, Any], resumed: Path | None
) -> "RunConfig":
    """The configuration; with ``--resume`` that of the run, on top of which the same options may be given again.

    Args:
        recipe: ``--recipe``.
        config: ``--config``.
        assign: ``--set``.
        given: ``section.key`` to value; None where not given.
        resumed: the run directory, with ``--resume``.

    Raises:
        ConfigError: an assignment without ``=``.
        RunDirectoryError: nothing to resume.
    """
    from saqcli.config import resolve

    pairs = {}
    for text in assign:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: give SECTION.KEY=VALUE, such as training.lr=0.01")
        pairs[key.strip()] = value.strip()
    if resumed is not None and config is None:
        if (resumed / "config.json").is_file():
            config = resumed / "config.json"
        elif given["model.name"] is None:
            raise RunDirectoryError(
                f"{resumed} holds no run to go on with: give MODEL and its options to start one"
            )
    return resolve(recipe=recipe, file=config, assignments=pairs, options=given)


def default_run_dir(config: "RunConfig", *more: str) -> Path:
    """``runs/resnet18-w4a4``: the network's name, what it is quantized to, and ``more``."""
    wanted, name = config.quantization, config.model.name.split("/")[-1]
    bits = (
        wanted.bops or wanted.size or wanted.bits or (Path(wanted.policy).stem if wanted.policy else "float")
    )
    return Path("runs") / "-".join((name, folder_of_bits(bits), *more))


def show_plan(config: "RunConfig", target: Path, *, json_output: bool) -> None:
    """What a run would do and cost, without doing it."""
    from saqcli.progress import SILENT
    from saqcli.workflows.plan import plan

    result = plan(config, target, SILENT)
    if json_output:
        print_json(result)
        return
    typer.echo(config.to_json().rstrip())
    from saqcli.cli.tables import show_profile

    show_profile(result["profile"])
