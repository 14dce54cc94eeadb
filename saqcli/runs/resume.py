"""What a resumed run must have in common with the run that was interrupted: its settings."""

from collections.abc import Callable

from saqcli import distributed
from saqcli.config import RunConfig
from saqcli.errors import ConfigError
from saqcli.process_group import may_be_restarted, restarted
from saqcli.runs.directory import RunDirectory


def goes_on(run: RunDirectory, *, resume: bool, overwrite: bool) -> bool:
    """Whether there is a run that is gone on with: as asked, or because torchrun has started its processes again.

    Raises:
        ConfigError: a run that would be removed by every restart.
        RunDirectoryError: what is there cannot be used.
    """
    if may_be_restarted():
        if overwrite:
            raise distributed.reported_once(
                ConfigError(
                    "`overwrite=True` would remove the run whenever torchrun starts its processes again: remove "
                    f"{run.path} by hand, or give torchrun no restarts"
                )
            )
        usable = run.check_usable(resume=True, overwrite=False)
        resume = resume or (usable and distributed.from_first(lambda: run.manifest().status != "finished"))
    elif restarted():
        resume = run.check_usable(resume=True, overwrite=False) or resume
    there = run.check_usable(resume=resume, overwrite=overwrite)
    return resume and there


def note_start(run: RunDirectory, note: Callable[[str], None]) -> None:
    """Note that a run starts again from its beginning, where the process before was killed too early."""
    if run.killed and not run.saved():
        note(f"starting again (process {run.killed.pid} was killed before anything was saved)")


def resuming(run: RunDirectory, place: str) -> str:
    """The note of a run that is resumed at ``place``, and whether the process before was killed."""
    return f"resuming {place}" + (f" (process {run.killed.pid} was killed)" if run.killed else "")


def check_same(run: RunDirectory, config: RunConfig) -> None:
    """Refuse to go on with a run under other settings.

    Raises:
        ConfigError: names the first setting that differs.
    """
    there = (run.path / "config.json").is_file()
    difference = first_difference(kept_as(run.config(), config), config) if there else None
    if difference:
        raise ConfigError(
            f"{run.path} was started with other settings ({difference}): give the same ones with `resume=True`, "
            "or start again with `overwrite=True`"
        )


def kept_as(one: RunConfig, other: RunConfig) -> RunConfig:
    """``one`` exporting the state that ``other`` does: both are in the checkpoint, so that a run may be asked anew."""
    training = one.training.model_copy(update={"keep": other.training.keep})
    return one.model_copy(update={"training": training})


def first_difference(one: RunConfig, other: RunConfig) -> str | None:
    """``section.key: old -> new`` of the first setting that differs, or None."""
    old, new = one.model_dump(), other.model_dump()
    for section, values in old.items():
        if not isinstance(values, dict):
            if values != new[section]:
                return f"{section}: {values} -> {new[section]}"
            continue
        for key, value in values.items():
            if value != new[section][key]:
                return f"{section}.{key}: {value} -> {new[section][key]}"
    return None
