"""``saq rerun``: a finished run done again from what its directory holds, and compared with it.

    read       what the run left; refused before any time is spent where something is missing
    restore    the directory that its relative paths refer to, its device, threads and reading processes
    run        the same verb with the same settings, in a directory of its own
    compare    policy, search, metrics, weights, ONNX, figures; and why they may differ

The first run is read, and never written to.
"""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saqcli import distributed
from saqcli.config import RunConfig
from saqcli.data.loaders import MAX_WORKERS, default_workers
from saqcli.errors import ConfigError, DataError, Interrupted, RunDirectoryError
from saqcli.machine import cores, resolve_device
from saqcli.pipelines.quantize import quantize
from saqcli.pipelines.search import search
from saqcli.pipelines.setup import load_float
from saqcli.pipelines.targets import find_target
from saqcli.progress import SILENT, Progress
from saqcli.random_state import random_state, set_random_state, torch_threads
from saqcli.report.comparison import Difference, Record, compare, explain_diff, versions_differ
from saqcli.runs.directory import RunDirectory
from saqcli.runs.manifest import Circumstances, RunManifest
from saqcli.runs.resume import first_difference
from saqcli.serialization import parse_object, printable
from saqcli.units import counted

VERBS: dict[str, Callable[..., Any]] = {"quantize": quantize, "search": search}
MAY_DIFFER = ("data.path", "data.workers", "model.weights", "quantization.policy", "run.device")
NAMED_SETS = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")  # timm's, which are no paths


@dataclass(frozen=True)
class Changes:
    """What is taken from elsewhere than the run says; None for as it says.

    Attributes:
        data: images.
        weights: float weights.
        device: to compute on.
        workers: processes that read images.
    """

    data: str | None = None
    weights: Path | None = None
    device: str | None = None
    workers: int | None = None

    def absolute(self) -> "Changes":
        """The same, whatever the current directory becomes."""
        data, weights = self.data, self.weights
        if data is not None and not _is_named(data):
            data = str(Path(data).expanduser().absolute())
        return replace(self, data=data, weights=weights and weights.expanduser().absolute())

    def applied(self, config: RunConfig) -> RunConfig:
        """``config`` with them."""
        weights = self.weights and str(self.weights)
        given = {"data.path": self.data, "data.workers": self.workers, "model.weights": weights}
        given["run.device"] = self.device
        return _with(config, {key: value for key, value in given.items() if value is not None})


AS_IT_WAS = Changes()


@dataclass(frozen=True)
class Rerun:
    """How a run compares with the one before.

    Attributes:
        run_dir: of the new run.
        reran: of the run that was done again.
        compared: what was compared.
        differences: what of it is not the same; empty where all bits are.
        reasons: likely ones, a line each, where something differs.
        versions: name to what it was and is, where these differ.
    """

    run_dir: Path
    reran: Path
    compared: list[str]
    differences: list[Difference]
    reasons: list[str]
    versions: dict[str, list[str | None]]

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {
            "run_dir": str(self.run_dir),
            "reran": str(self.reran),
            "identical": self.identical,
            "compared": self.compared,
            "differences": [difference._asdict() for difference in self.differences],
            "reasons": self.reasons,
            "versions_differ": self.versions,
        }


def rerun(
    run_dir: Path,
    new_dir: Path | None = None,
    changes: Changes = AS_IT_WAS,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Rerun:
    """Do the run in ``run_dir`` again in ``new_dir`` and compare the two.

    Args:
        run_dir: of a finished ``saq quantize`` or ``saq search``; left as it is.
        new_dir: made if it is not there; None is ``run_dir`` with ``-rerun`` behind its name.
        changes: what is taken from elsewhere.
        resume: go on with the run in ``new_dir``; one that is finished is compared.
        overwrite: replace the run in ``new_dir``.
        progress: told about everything that takes time.

    Raises:
        SaqError: anything the user can act on.
    """
    run_dir = find_target(str(run_dir), ("run",), "RUN").path or run_dir
    old = RunDirectory.open(run_dir.resolve())
    manifest = old.manifest()
    _check_finished(RunDirectory.open(run_dir), manifest)
    beside = run_dir if run_dir.name == old.path.name else old.path
    new_dir = new_dir or beside.with_name(f"{beside.name}-rerun")
    new = RunDirectory(new_dir.resolve(), manifest.verb)
    _check_apart(old.path, new.path)
    before = Record.read(old)
    there = new.check_usable(resume=resume, overwrite=overwrite)
    if resume and there:
        _check_is_rerun(old.config(), new.config(), new.path, run_dir)
    if not resume or not there or new.manifest().status != "finished":
        changes = changes.absolute()
        then = manifest.circumstances[0] if manifest.circumstances else None
        with _as_then(then, run_dir, new_dir, progress):
            config = new.config() if resume and there else _restored(old, then)
            config = changes.applied(config)
            _check_there(config, run_dir)
            try:
                VERBS[manifest.verb](config, new.path, resume=resume, overwrite=overwrite, progress=progress)
            except Interrupted as error:
                command = f"`rerun({str(run_dir)!r}, run_dir={str(new_dir)!r}, resume=True)`"
                raise Interrupted(command, error.exit_code, saved=error.saved) from None
    after = Record.read(new)
    compared, differences = compare(before, after)
    return Rerun(
        new_dir,
        run_dir,
        compared,
        differences,
        explain_diff(before, after) if differences else [],
        versions_differ(before.manifest, after.manifest),
    )


def _check_finished(run: RunDirectory, manifest: RunManifest) -> None:
    if manifest.verb not in VERBS:
        raise RunDirectoryError(
            f"{run.path} is of `saq {manifest.verb}`: give a run of {' or '.join(f'`saq {verb}`' for verb in VERBS)}"
        )
    if manifest.status != "finished":
        raise RunDirectoryError(
            f"{run.path} {run.standing()}, so there is nothing to compare with: {run.next_step()} first"
        )


def _check_apart(old: Path, new: Path) -> None:
    """Nothing is written into the run that is done again, nor around it."""
    if old == new or old in new.parents or new in old.parents:
        raise RunDirectoryError(
            f"{new} and {old} are the same or one in the other, and the run must not change: use another "
            "`run_dir`"
        )


def _check_is_rerun(old: RunConfig, new: RunConfig, new_dir: Path, run_dir: Path) -> None:
    """A run that is gone on with must have the settings of the first but for what a rerun may change."""
    difference = first_difference(_with(old, {key: _get(new, key) for key in MAY_DIFFER}), new)
    if difference:
        raise ConfigError(
            f"{new_dir} is not a rerun of {run_dir} ({difference}): use another `run_dir`, or `overwrite=True`"
        )


def _check_there(config: RunConfig, run_dir: Path) -> None:
    """What the run was made from, named with the option that says where it is now."""
    data, weights = config.data.path, config.model.weights
    if data is not None and not _is_named(data) and not Path(data).expanduser().is_dir():
        raise DataError(
            f"the images of {run_dir} are no longer in {Path(data).absolute()}: use `data.path=DIR` with the same"
        )
    if weights is not None and not Path(weights).is_file():
        raise ConfigError(
            f"the weights of {run_dir} are no longer in {Path(weights).absolute()}: use `model.weights=FILE` with "
            "the same"
        )


def _restored(run: RunDirectory, then: Circumstances | None) -> RunConfig:
    """The settings of ``run``, where they leave a choice to the machine as it was made then."""
    config, changes = run.config(), dict[str, Any]()
    if config.quantization.policy is not None:
        changes["quantization.policy"] = str(run.policy_path)
    if then is None:
        return _with(config, changes)
    device = then.device.partition(" ")[0]
    if config.run.device == "auto" and device == "cpu" != resolve_device("auto"):
        changes["run.device"] = "cpu"
    if config.data.workers is None and then.cores != cores():
        changes["data.workers"] = _default_workers(config, then.cores)
    return _with(config, changes)


def _default_workers(config: RunConfig, cores_then: int) -> int:
    """How many processes read images by default on a machine with so many cores."""
    section = config.model.model_copy(update={"weights": None, "weights_key": None, "pretrained": False})
    if config.search.proxy is not None and config.search.proxy.input_size is not None:
        section = section.model_copy(update={"input_size": config.search.proxy.input_size})
    before = random_state()
    here = default_workers(load_float(section, SILENT).preprocessing)
    set_random_state(before)
    return min(MAX_WORKERS, cores_then) if here else 0


@contextmanager
def _as_then(then: Circumstances | None, run_dir: Path, new_dir: Path, progress: Progress) -> Iterator[None]:
    """In the directory that relative paths refer to, with as many threads as then."""
    if then is None:
        progress.note(
            "the run does not say with how many threads it was made, nor in which directory: those of now"
        )
        yield
        return
    if then.threads != torch.get_num_threads():
        progress.note(
            f"computing with {counted(then.threads, 'thread')}, as the run did: another number gives other bits"
        )
    if then.processes != distributed.count():
        progress.note(
            f"the run was made by {counted(then.processes, 'process')} and this is one, which gives other "
            f"bits: for the same ones start torchrun with `nproc_per_node={then.processes}`, "
            f"`config={shlex.quote(str(run_dir / 'config.json'))}` and another `run_dir`, and compare with "
            f"`rerun({str(run_dir)!r}, run_dir={str(new_dir)!r}, resume=True)`"
        )
    there = Path(then.directory).is_dir() and os.access(then.directory, os.X_OK)
    if not there:
        progress.note(
            f"{printable(then.directory)} cannot be entered: relative paths refer to the current directory"
        )
    with torch_threads(then.threads), chdir(then.directory) if there else nullcontext():
        yield


def _with(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """``config`` with other values at ``section.key``."""
    tree = config.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return parse_object(RunConfig, tree, "the settings of the rerun")


def _get(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _is_named(data: str) -> bool:
    """Whether it is a name that timm knows, and no folder."""
    return data.lower().startswith(NAMED_SETS) and not Path(data).exists()
