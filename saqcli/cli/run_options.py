"""Arguments and options of the commands that read or write a run directory, and their configuration."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saqcli.cli.console import print_json, progress_for
from saqcli.cli.options import Given, folder_of_bits, folder_of_model
from saqcli.config import DataSection, RunConfig, resolve_into
from saqcli.errors import ConfigError, InfeasibleBudget, RunDirectoryError, SaqError
from saqcli.option import EXPORT, RUN

if TYPE_CHECKING:
    from saqcli.runs.listing import Holding

DATA_VARIABLE = "SAQ_DATA"  # of the environment: the default data
LEFT_OUT = "left out, the latest run in runs/, as `latest` is; a folder with one run in it is that run"

Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Settings from a TOML or JSON file, such as the config.json of a run",
        rich_help_panel=RUN,
    ),
]
Assign = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Any setting, such as `training.momentum=0.8`. May be repeated",
        rich_help_panel=RUN,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run in --run-dir", rich_help_panel=RUN)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run in --run-dir", rich_help_panel=RUN)
]
Export = Annotated[
    bool | None,
    typer.Option(
        "--export/--no-export",
        help="Export the quantized model to ONNX, tried once before training; --no-export saves model.safetensors only "
        "[default: --export]",
        show_default=False,
        rich_help_panel=EXPORT,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check model, images, device, bits and settings, print the plan, and stop",
        rich_help_panel=RUN,
    ),
]


def chosen_run(
    text: str | None, needs: "Holding", *, models: bool = False, json_output: bool, quiet: bool
) -> str:
    """The run, file or model that ``text`` refers to; which run it is is noted if it was not named.

    Args:
        text: the argument; None if it was left out.
        needs: what the command needs of the latest run.
        models: whether the command accepts names of models.
        json_output: ``--json``.
        quiet: ``--quiet``.

    Raises:
        RunDirectoryError: the latest run is wanted, and there is none.
    """
    from saqcli.api.sources import is_model
    from saqcli.runs.listing import take_run

    taken = take_run(text, needs, is_model=is_model if models else lambda name: False)
    if taken.note is not None:
        progress_for(json_output=json_output, quiet=quiet).note(taken.note)
    return taken.text


def images_for(
    given: Given, source: str, *, json_output: bool, quiet: bool, optional: bool = False
) -> DataSection:
    """The images for the command: those of ``--data``, else those of the run ``source``, else those of ``SAQ_DATA``.

    Args:
        given: the settings of the options; errors are added to its problems.
        source: a run directory, file or model name.
        json_output: ``--json``.
        quiet: ``--quiet``.
        optional: whether the command needs no images; those of a run that were moved are noted then.
    """
    from saqcli.runs.directory import RunDirectory
    from saqcli.runs.images import data_of_run

    of_run, named = None, os.environ.get(DATA_VARIABLE)
    progress, path = progress_for(json_output=json_output, quiet=quiet), Path(source).expanduser()
    if "data.path" not in given and (path / "manifest.json").is_file():
        try:
            found = data_of_run(RunDirectory.open(path))
            if optional and found.path is not None:
                from saqcli.data.splits import check_opens

                check_opens(found)
            of_run = found
        except SaqError as error:
            if not optional:
                given.problems.add(error)
                return given.data(DataSection(path=str(path)))  # which is not opened
            progress.note(f"{error}; synthetic images are used")
    images = given.data(of_run)
    if images.path is None and named and (of_run is None or not optional or of_run.calibration is None):
        images = images.model_copy(update={"path": named})
        progress.note(f"images: {named} ({DATA_VARIABLE})")
    elif of_run is not None and (place := images.path or images.calibration) is not None:
        progress.note(f"images: {place}, those of the run")
    return images


def resolved(
    given: Given,
    config: Path | None,
    assign: list[str] | None,
    resumed: tuple[str, Path] | None,
    check: Callable[[RunConfig], None],
) -> RunConfig:
    """The resolved configuration; with ``--resume``, that of the run, overridden by the given options.

    Args:
        given: settings of the options; if there are problems, ``check`` adds its own and all are raised together.
        config: ``--config``.
        assign: ``--set``.
        resumed: the command and its run directory, with ``--resume``.
        check: the command's checks before anything is loaded.

    Raises:
        SaqError: all problems in one message: earlier ones, assignments without ``=``, unknown keys, no run to resume.
    """
    problems, pairs = given.problems, {}
    for text in assign or []:
        key, equals, value = text.partition("=")
        if equals:
            pairs[key.strip()] = value.strip()
        else:
            problems.add(ConfigError(f"--set {text}: give SECTION.KEY=VALUE, such as training.lr=0.01"))
    if resumed is not None and config is None:
        config = _config_of(*resumed)
        if config is None and "model.name" not in given:
            raise RunDirectoryError(
                f"{resumed[1]} holds no run to resume: give MODEL and options to start a new one"
            )
    recipe = given.pop("recipe", None)
    found = resolve_into(
        problems,
        recipe=recipe,
        file=config,
        assignments=pairs,
        options=given,
        images=os.environ.get(DATA_VARIABLE),
    )
    if problems.errors and found is not None:
        problems.attempt(check, found)
    problems.check()
    assert found is not None
    return found


def _config_of(verb: str, run_dir: Path) -> Path | None:
    """The configuration file of the run in ``run_dir``; None if there is none.

    Raises:
        RunDirectoryError: a run of another command.
    """
    if not (run_dir / "config.json").is_file():
        return None
    from saqcli.runs.directory import RunDirectory

    RunDirectory(run_dir, verb).check_usable(resume=True, overwrite=False)
    return run_dir / "config.json"


def default_run_dir(config: RunConfig, *more: str) -> Path:
    """``runs/resnet18-w4a4``: the network's name, its bits or budget, and ``more``."""
    from saqcli.runs.listing import FOLDER
    from saqcli.runs.summary import asked_bits

    name, bits = config.model.name.split("/")[-1], asked_bits(config.quantization)
    return FOLDER / "-".join((folder_of_model(name), folder_of_bits(bits), *more))


def check_accuracy(result: dict[str, Any]) -> None:
    """Report a budget of accuracy that the finished run misses, by its exit code.

    Raises:
        InfeasibleBudget: says by how much; the run and its files are kept.
    """
    from saqcli.report.accuracy import missed_line

    missed = missed_line(result["accuracy"]) if result.get("accuracy") else None
    if missed is not None:
        raise InfeasibleBudget(f"{missed} (the run is finished, in {result['run_dir']})")


def dry_run(
    config: RunConfig,
    target: Path,
    verb: str,
    *,
    resume: bool,
    overwrite: bool,
    json_output: bool,
    quiet: bool,
) -> None:
    """Print what a run would do and cost."""
    from saqcli.pipelines.dry_run import plan

    progress = progress_for(json_output=json_output, quiet=quiet)
    result = plan(config, target, progress, verb=verb, resume=resume, overwrite=overwrite)
    if json_output:
        print_json(result)
        return
    from saqcli.cli.screens.dry_run import show_plan

    show_plan(result)
