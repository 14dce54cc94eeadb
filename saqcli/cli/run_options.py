"""Options of commands that leave a run directory, and the settings that they make together."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saqcli.cli.options import RUN, folder_of_bits
from saqcli.cli.screen import print_json, progress_for
from saqcli.errors import ConfigError, RunDirectoryError

if TYPE_CHECKING:
    from saqcli.config import RunConfig

Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Settings to start from: cifar, imagenet, paper-cifar, paper-imagenet, quick or vit; the defaults shown "
        "here are those of quick [default: quick]",
        rich_help_panel=RUN,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Settings from a TOML or JSON file, such as the config.json of a run.",
        rich_help_panel=RUN,
    ),
]
Assign = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Any setting, such as `training.momentum=0.8`. May be repeated.",
        rich_help_panel=RUN,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run in --run-dir.", rich_help_panel=RUN)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run in --run-dir.", rich_help_panel=RUN)
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check model, images, device, bits and settings, print the plan, and stop.",
        rich_help_panel=RUN,
    ),
]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic",
        help="Use deterministic kernels only, so that a GPU gives the same bits again; slower, and refused where a "
        "kernel is missing.",
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Random seed [default: 0]", rich_help_panel=RUN)
]


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


def dry_run(
    config: "RunConfig",
    target: Path,
    verb: str,
    *,
    resume: bool,
    overwrite: bool,
    json_output: bool,
    quiet: bool,
) -> None:
    """What a run would do and cost, without doing it."""
    from saqcli.workflows.plan import plan

    progress = progress_for(json_output=json_output, quiet=quiet)
    result = plan(config, target, progress, verb=verb, resume=resume, overwrite=overwrite)
    if json_output:
        print_json(result)
        return
    from saqcli.cli.plan_view import show_plan

    show_plan(result)
