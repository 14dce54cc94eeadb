"""Resuming a run: whether to, whether its settings agree, and the note about it."""

from collections.abc import Callable
from typing import Any

from saqcli import distributed
from saqcli.config import RunConfig
from saqcli.errors import ConfigError
from saqcli.process_group import may_be_restarted, restarted
from saqcli.runs.directory import RunDirectory


def should_resume(run: RunDirectory, *, resume: bool, overwrite: bool) -> bool:
    """Whether an existing run is resumed: on request, or because torchrun has restarted its processes.

    Raises:
        ConfigError: ``overwrite`` under torchrun with restarts, each of which would remove the run.
        RunDirectoryError: the directory cannot be used.
    """
    if may_be_restarted():
        if overwrite:
            raise distributed.reported_once(
                ConfigError(
                    "`overwrite=True` would remove the run whenever torchrun restarts its processes: remove "
                    f"{run.path} by hand, or start torchrun without restarts"
                )
            )
        usable = run.check_usable(resume=True, overwrite=False)
        resume = resume or (usable and distributed.from_first(lambda: run.manifest().status != "finished"))
    elif restarted():
        resume = run.check_usable(resume=True, overwrite=False) or resume
    there = run.check_usable(resume=resume, overwrite=overwrite)
    return resume and there


def note_restart(run: RunDirectory, note: Callable[[str], None]) -> None:
    """Note that a run restarts from the beginning if its last process was killed before the first checkpoint."""
    if run.killed and not run.saved():
        note(f"starting from the beginning (process {run.killed.pid} was killed before its first checkpoint)")


def resuming(run: RunDirectory, place: str) -> str:
    """The note about resuming at ``place``; says if the last process was killed."""
    return f"resuming {place}" + (f" (process {run.killed.pid} was killed)" if run.killed else "")


def check_same_settings(run: RunDirectory, config: RunConfig) -> None:
    """Check that a resumed run has the settings it was started with.

    Raises:
        ConfigError: names the first setting that differs.
    """
    there = (run.path / "config.json").is_file()
    difference = first_difference(with_free_settings(run.config(), config), config) if there else None
    if difference:
        raise ConfigError(
            f"{run.path} was started with other settings ({difference}): give the same ones with `resume=True`, "
            "or start again with `overwrite=True`"
        )


def with_free_settings(one: RunConfig, other: RunConfig) -> RunConfig:
    """``one`` with the settings of ``other`` that a resumed run may change.

    These are ``training.keep``, as checkpoints hold both states, and ``data.cache`` and ``run.track``, which change no
    result.
    """
    training = one.training.model_copy(update={"keep": other.training.keep})
    data = one.data.model_copy(update={"cache": other.data.cache})
    tracked = one.run.model_copy(update={"track": other.run.track})
    return one.model_copy(update={"training": training, "data": data, "run": tracked})


def first_difference(one: RunConfig, other: RunConfig) -> str | None:
    """``section.key: old -> new`` of the first setting that differs, or None; of files, which one has changed."""
    old, new = one.model_dump(), other.model_dump()
    for section, values in old.items():
        if not isinstance(values, dict):
            if values != new[section]:
                return f"{section}: {values} -> {new[section]}"
            continue
        for key, value in values.items():
            if value != new[section][key]:
                if key == "contents":
                    return _edited(other, value, new[section][key])
                return f"{section}.{key}: {value} -> {new[section][key]}"
    return None


def _edited(config: RunConfig, old: dict[str, Any], new: dict[str, Any]) -> str:
    """Which file that a setting names has other content than the run recorded."""
    setting = next(name for name in (*old, *new) if old.get(name) != new.get(name))
    file = getattr(config.quantization, setting)
    return f"{file} was edited since; remove `quantization.{setting}` to use what the run recorded"
